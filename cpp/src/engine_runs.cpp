// What goes into a run of a graph, and what becomes of what comes out.
#include <algorithm>
#include <limits>

#include "engine.hpp"

namespace l2a::core {

// What the graphs read beside tokens and mask; an allocation of -1 asks the gates.
void Engine::fill(const std::vector<Request*>& requests) {
    const auto layers = static_cast<std::size_t>(runtime_->manifest().shape.num_layers);
    const auto words = static_cast<std::size_t>(runtime_->manifest().shape.vocab_size);
    const std::size_t rows = requests.size();
    arrays_.budget.clear();
    arrays_.limits.clear();
    arrays_.price.clear();
    arrays_.allocation.assign(rows * layers, -1);
    for (std::size_t row = 0; row < rows; ++row) {
        const Told& told = requests[row]->told;
        arrays_.budget.insert(arrays_.budget.end(), {told.compute, told.share});
        arrays_.limits.insert(arrays_.limits.end(), {told.units, told.layers, told.heads});
        arrays_.price.push_back(told.price);
        std::copy(requests[row]->kept.begin(), requests[row]->kept.end(),
                  arrays_.allocation.begin() + static_cast<std::ptrdiff_t>(row * layers));
    }
    arrays_.kept.resize(rows * layers);
    arrays_.variant.resize(rows);
    arrays_.logits.resize(rows * words);
    arrays_.tau.resize(rows);
}

Run Engine::run_of(std::int64_t batch, std::int64_t sequence, std::int64_t total) {
    Run run;
    run.batch = batch;
    run.sequence = sequence;
    run.total = total;
    run.input_ids = arrays_.ids.data();
    run.mask = arrays_.mask.data();
    run.budget = arrays_.budget.data();
    run.limits = arrays_.limits.data();
    run.price = arrays_.price.data();
    run.allocation = arrays_.allocation.data();
    run.logits = arrays_.logits.data();
    run.kept_groups = arrays_.kept.data();
    run.tau = arrays_.tau.data();
    run.variant = arrays_.variant.data();
    return run;
}

// What the graph says becomes the token that is fed next.
void Engine::take(Request& request, std::size_t row) {
    const Manifest& manifest = runtime_->manifest();
    const auto words = static_cast<std::size_t>(manifest.shape.vocab_size);
    float* logits = arrays_.logits.data() + row * words;
    if (request.reasoning.begins_answer()) {
        logits[manifest.tags.end_answer] = -std::numeric_limits<float>::infinity();
    }
    const bool gate = request.asks_gate && !options_.variants;  // variants have none
    const bool stop = gate && static_cast<double>(arrays_.tau[row]) > request.limits.tau_threshold;
    try {
        request.written.push_back(request.reasoning.advance(request.sampler.token(logits, words), stop));
    } catch (const Error& error) {
        end(request, error.code(), error.what());
    }
}

void Engine::end(Request& request, l2a_code error, const char* message) noexcept {
    request.reasoning.stage = Reasoning::Stage::done;
    request.error = error;
    try {
        request.message = message;
    } catch (const std::bad_alloc&) {  // the code alone must do
    }
}

}  // namespace l2a::core
