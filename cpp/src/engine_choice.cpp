// Which allocation a request gets, and the graph that runs it.
#include <algorithm>
#include <cstdlib>

#include "engine.hpp"

namespace l2a::core {
namespace {

constexpr std::size_t kMostChosen = 256;  // budgets whose allocation is kept

}  // namespace

std::vector<std::size_t> Engine::fitting(const Budget& budget) const {
    const Manifest& manifest = runtime_->manifest();
    std::vector<std::size_t> found;
    for (const std::size_t place : manifest.variants) {
        if (manifest.cost.fits(manifest.graphs[place].widths, budget)) found.push_back(place);
    }
    return found;
}

const Graph* Engine::graph_of(const Widths& kept) const {
    const auto found =
        std::find_if(graphs_.begin(), graphs_.end(), [&](const Graph* graph) { return graph->entry().widths == kept; });
    if (found == graphs_.end()) throw Error(L2A_ERROR_INTERNAL, "a request has an allocation that no variant has");
    return *found;
}

Widths Engine::choose(Request& request, const Budget& budget, const Told& told) {
    for (const auto& [known, kept] : choices(request, told)) {
        if (known == told) return kept;
    }
    Widths kept;
    if (options_.variants) {
        kept = fixed(request, budget, told);
    } else {
        route(request, told);
        kept = arrays_.kept;
    }
    remember(request, told, kept);
    return kept;
}

std::vector<std::pair<Told, Widths>>& Engine::choices(Request& request, const Told& told) {
    return runtime_->manifest().rules.blind(told) ? chosen_ : request.chosen;
}

void Engine::remember(Request& request, const Told& told, const Widths& kept) {
    auto& known = choices(request, told);
    const auto same = [&](const auto& pair) { return pair.first == told; };
    if (std::any_of(known.begin(), known.end(), same)) return;
    if (known.size() >= kMostChosen) known.clear();
    known.emplace_back(told, kept);
}

// Of the variants that keep to a budget the largest; of several, what the router says. It knows budgets and no other
// caps: where its choice breaks one, the nearest that does not takes its place.
Widths Engine::fixed(const Request& request, const Budget& budget, Told told) {
    const Manifest& manifest = runtime_->manifest();
    std::vector<std::size_t> same = fitting(budget);
    const GraphEntry& largest = manifest.graphs[same.front()];
    same.erase(std::remove_if(same.begin(), same.end(),
                              [&](std::size_t place) { return manifest.graphs[place].budget != largest.budget; }),
               same.end());
    if (same.size() == 1) return largest.widths;
    told.compute = static_cast<float>(largest.budget);
    route(request, told);
    const auto place = static_cast<std::size_t>(arrays_.variant.front());
    if (place >= manifest.variants.size()) {
        throw Error(L2A_ERROR_SESSION, "the router names a variant that the bundle has not; export it again");
    }
    const auto named = std::find(same.begin(), same.end(), manifest.variants[place]);
    if (named != same.end()) return manifest.graphs[*named].widths;
    const auto apart = [&](std::size_t one) {
        std::int64_t total = 0;
        for (std::size_t layer = 0; layer < arrays_.kept.size(); ++layer) {
            total += std::abs(manifest.graphs[one].widths[layer] - arrays_.kept[layer]);
        }
        return total;
    };
    const auto nearest = std::min_element(
        same.begin(), same.end(), [&](std::size_t one, std::size_t other) { return apart(one) < apart(other); });
    return manifest.graphs[*nearest].widths;
}

// Asks the router graph, which leaves its answer in the arrays.
void Engine::route(const Request& request, const Told& told) {
    const Graph* router = runtime_->first(Kind::router);
    if (router == nullptr) {
        bundle_error(runtime_->bundle().folder + ": no router graph is open to ask the gates again; export it again");
    }
    const std::size_t unread = runtime_->manifest().rules.blind(told) ? request.prompt.size() - 1 : 0;
    const auto size = static_cast<std::int64_t>(request.prompt.size() - unread);
    const std::vector<std::int64_t> mask(static_cast<std::size_t>(size), 1);
    const float budget[] = {told.compute, told.share};
    const std::int64_t limits[] = {told.units, told.layers, told.heads};
    arrays_.kept.resize(static_cast<std::size_t>(runtime_->manifest().shape.num_layers));
    arrays_.variant.resize(1);
    Run run = run_of(1, size, size);
    run.input_ids = request.prompt.data() + unread;
    run.mask = mask.data();
    run.budget = budget;
    run.limits = limits;
    run.price = &told.price;
    router->run(run);
}

}  // namespace l2a::core
