#include "engine.hpp"

#include <algorithm>

#include "signals.hpp"

namespace l2a::core {
namespace {

std::vector<const Graph*> serving(const Runtime& runtime, bool variants) {
    std::vector<const Graph*> found;
    for (const auto& graph : runtime.graphs()) {
        if (graph->entry().kind == (variants ? Kind::variant : Kind::any)) found.push_back(graph.get());
    }
    if (found.empty()) {
        bundle_error(runtime.bundle().folder + ": no " + (variants ? "variants are" : "If graph is") +
                     " open to serve; open with it, or export with " + (variants ? "--variants" : "--if-graph"));
    }
    return found;
}

}  // namespace

void Limits::check() const {
    if (max_think_tokens < 0) config_error("max_think_tokens must be at least 0");
    if (max_answer_tokens < 1) config_error("max_answer_tokens must be at least 1");
}

Engine::Engine(std::shared_ptr<const Runtime> runtime, const EngineOptions& options)
    : runtime_(std::move(runtime)), options_(options), graphs_(serving(*runtime_, options.variants)), caches_(graphs_) {
    if (options_.max_rows < 1) config_error("max_rows must be at least 1, found " + std::to_string(options_.max_rows));
    if (!options_.memory_left) options_.memory_left = memory_source("");
    rows_.reserve(static_cast<std::size_t>(options_.max_rows));
}

std::uint64_t Engine::submit(std::vector<std::int64_t> prompt, const Budget& budget, const Limits& limits,
                             const Sampling& sampling) {
    limits.check();
    sampling.check();
    const Told what = told(budget);
    check(prompt, limits.cap(budget), limits.max_answer_tokens);
    const Manifest& manifest = runtime_->manifest();
    const std::uint64_t id = next_++;
    auto made = std::make_unique<Request>(id, std::move(prompt), budget, limits, what, manifest.tags, sampling);
    made->asks_gate = limits.tau_threshold >= 0 && manifest.tokens;
    made->submitted = steady_seconds();
    made->reserve(limits.cap(budget));
    Request* request = (requests_[id] = std::move(made)).get();
    try {
        waiting_.push_back(request);
    } catch (...) {
        requests_.erase(id);
        throw;
    }
    return id;
}

void Engine::set_budget(Request& request, const Budget& budget) {
    if (request.done()) return;
    const Told what = told(budget);
    const std::int64_t cap = request.limits.cap(budget);
    check(request.prompt, cap, request.limits.max_answer_tokens);
    Widths kept;
    if (!request.kept.empty()) kept = choose(request, budget, what);
    bool grows = false;
    for (std::size_t layer = 0; layer < kept.size(); ++layer) grows = grows || kept[layer] > request.kept[layer];
    const Graph* graph = options_.variants && !kept.empty() ? graph_of(kept) : request.graph;
    request.reserve(cap);
    const bool holes = options_.variants || !runtime_->manifest().whole_cache;
    if (request.row < 0) full_ = -1;  // there may be room for what it needs now
    if (grows && holes && request.row >= 0) interrupt(request);
    request.budget = budget;  // nothing fails from here on
    request.told = what;
    request.reasoning.cap = cap;
    request.graph = graph;
    if (!kept.empty()) request.kept = std::move(kept);
}

void Engine::cancel(Request& request) {
    if (!request.done()) end(request);
    waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &request), waiting_.end());
    full_ = -1;  // what it waited for is nothing to the next one
    if (request.row >= 0) remove(request.row);
    rest();
}

void Engine::forget(std::uint64_t id) {
    Request& found = request(id);
    cancel(found);
    requests_.erase(id);
}

Request& Engine::request(std::uint64_t id) const {
    const auto found = requests_.find(id);
    if (found == requests_.end()) config_error("request " + std::to_string(id) + ": there is no such one any more");
    return *found->second;
}

std::int64_t Engine::running() const {
    return std::count_if(rows_.begin(), rows_.end(), [](const Request* request) { return !request->done(); });
}

bool Engine::busy() const {
    return !waiting_.empty() || running() > 0;
}

double Engine::oldest_seconds() const {
    const auto new_one = [](const Request* request) { return request->written.empty(); };  // not interrupted
    const auto first = std::find_if(waiting_.begin(), waiting_.end(), new_one);
    return first == waiting_.end() ? 0.0 : steady_seconds() - (*first)->submitted;
}

Told Engine::told(const Budget& budget) const {
    const Told found = runtime_->told(budget);
    if (options_.variants && fitting(budget).empty()) {
        budget_error("no variant of the bundle keeps to the budget " + std::to_string(budget.compute) +
                     " and its caps; export one with --ladder");
    }
    return found;
}

void Engine::check(const std::vector<std::int64_t>& prompt, std::int64_t think, std::int64_t answer) const {
    const Manifest& manifest = runtime_->manifest();
    for (const std::int64_t token : prompt) {
        if (token < 0 || token >= manifest.shape.vocab_size) {
            config_error("prompt: token id " + std::to_string(token) + " is not in the vocabulary of " +
                         std::to_string(manifest.shape.vocab_size));
        }
    }
    if (prompt.empty() || prompt.back() != manifest.tags.think) {
        config_error("prompt: must end in <think>, token id " + std::to_string(manifest.tags.think));
    }
    const auto size = static_cast<std::int64_t>(prompt.size());
    // Of limits far above the positions a sum would overflow.
    const std::int64_t most = manifest.positions;
    const std::int64_t new_tokens = std::min(think, most) + std::min(answer, most) + kWrittenTags;
    if (think > most || answer > most || size > most - new_tokens) {
        config_error("prompt: " + std::to_string(size) + " tokens and at most " + std::to_string(new_tokens) +
                     " new ones are more than the " + std::to_string(manifest.positions) +
                     " positions of the bundle; shorten it or lower its limits");
    }
}

}  // namespace l2a::core
