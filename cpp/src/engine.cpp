#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <limits>

namespace l2a::core {
namespace {

constexpr int kTries = 3;  // of a run that fails for another reason than memory

double now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration<double>(since).count();
}

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
    : runtime_(std::move(runtime)),
      options_(options),
      graphs_(serving(*runtime_, options.variants)),
      caches_(graphs_) {
    if (options_.max_rows < 1) config_error("max_rows must be at least 1, found " + std::to_string(options_.max_rows));
}

std::uint64_t Engine::submit(std::vector<std::int64_t> prompt, const Budget& budget, const Limits& limits,
                             const Sampling& sampling) {
    limits.check();
    sampling.check();
    const Told what = told(budget);
    check(prompt, limits.cap(budget) + limits.max_answer_tokens + kWrittenTags);
    const Manifest& manifest = runtime_->manifest();
    const std::uint64_t id = next_++;
    auto made = std::make_unique<Request>(id, std::move(prompt), budget, limits, what, manifest.tags, sampling);
    made->asks_gate = limits.tau_threshold >= 0 && manifest.tokens;
    made->submitted = now();
    waiting_.push_back(made.get());
    requests_[id] = std::move(made);
    return id;
}

void Engine::set_budget(Request& request, const Budget& budget) {
    if (request.done()) return;
    const Told what = told(budget);
    const std::int64_t cap = request.limits.cap(budget);
    check(request.prompt, cap + request.limits.max_answer_tokens + kWrittenTags);
    Widths kept;
    if (!request.kept.empty()) kept = choose(request, budget, what);
    request.budget = budget;
    request.told = what;
    request.reasoning.cap = cap;
    if (kept.empty() || kept == request.kept) return;
    bool grows = false;
    for (std::size_t layer = 0; layer < kept.size(); ++layer) grows = grows || kept[layer] > request.kept[layer];
    request.kept = std::move(kept);
    if (options_.variants) request.graph = graph_of(request.kept);
    const bool holes = options_.variants || !runtime_->manifest().whole_cache;
    if (grows && holes && request.row >= 0) interrupt(request);
}

void Engine::cancel(Request& request) {
    if (request.done()) return;
    end(request);
    waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &request), waiting_.end());
}

void Engine::forget(std::uint64_t id) {
    Request& found = request(id);
    cancel(found);
    if (found.row >= 0) remove(found.row);
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

bool Engine::busy() const { return !waiting_.empty() || running() > 0; }

double Engine::oldest_seconds() const { return waiting_.empty() ? 0.0 : now() - waiting_.front()->submitted; }

Told Engine::told(const Budget& budget) const {
    budget.check();
    if (options_.variants && fitting(budget).empty()) {
        budget_error("no variant of the bundle keeps to the budget " + std::to_string(budget.compute) +
                     " and its caps; export one with --ladder");
    }
    return runtime_->told(budget);
}

void Engine::check(const std::vector<std::int64_t>& prompt, std::int64_t new_tokens) const {
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
    if (new_tokens > manifest.positions || size > manifest.positions - new_tokens) {
        config_error("prompt: " + std::to_string(size) + " tokens and at most " + std::to_string(new_tokens) +
                     " new ones are more than the " + std::to_string(manifest.positions) +
                     " positions of the bundle; shorten it or lower its limits");
    }
}

void Engine::step() {
    retire();
    admit_all();
    retire();
    if (!rows_.empty()) decode();
}

void Engine::admit_all() {
    while (!waiting_.empty() && static_cast<std::int64_t>(rows_.size()) < options_.max_rows &&
           (full_ < 0 || static_cast<std::int64_t>(rows_.size()) < full_)) {
        full_ = -1;
        Request& request = *waiting_.front();
        waiting_.pop_front();
        try {
            if (admit(request)) continue;
            waiting_.push_front(&request);
            full_ = static_cast<std::int64_t>(rows_.size());
            break;
        } catch (const Error& error) {
            failed(request, error);
            if (!request.done()) waiting_.push_front(&request);
        }
    }
}

// False where it must wait for memory.
bool Engine::admit(Request& request) {
    if (options_.variants && request.kept.empty()) request.kept = choose(request, request.budget, request.told);
    request.graph = options_.variants ? graph_of(request.kept) : graphs_.front();
    const auto used = static_cast<std::int64_t>(rows_.size());
    std::int64_t rows = used + 1;
    if (rows > caches_.rows()) rows = std::min(options_.max_rows, 2 * rows - 1);
    const std::int64_t bytes = caches_.bytes_for(rows, request.most_tokens());
    if (options_.max_cache_bytes > 0 && bytes > options_.max_cache_bytes) {
        if (used > 0) return false;
        throw Error(L2A_ERROR_OUT_OF_MEMORY, "request " + std::to_string(request.id) + ": " + std::to_string(bytes) +
                                                 " bytes of keys and values are more than max_cache_bytes, " +
                                                 std::to_string(options_.max_cache_bytes) + "; lower its limits");
    }
    caches_.reserve(rows, request.most_tokens());
    prefill(request);
    return true;
}

// Computes all tokens of a request into the row behind those that run, and lets it run.
void Engine::prefill(Request& request) {
    fill({&request});
    arrays_.ids = request.prompt;
    arrays_.ids.insert(arrays_.ids.end(), request.written.begin(), request.written.end());
    const auto size = static_cast<std::int64_t>(arrays_.ids.size());
    arrays_.mask.assign(arrays_.ids.size(), 1);
    Run run = run_of(1, size, size);
    const auto row = static_cast<std::int64_t>(rows_.size());
    run.caches = &caches_.view(*request.graph, row, 1);
    request.graph->run(run);
    request.length = size;
    request.row = row;
    rows_.push_back(&request);
    if (request.kept.empty()) request.kept = arrays_.kept;
    request.chosen.emplace_back(request.told, request.kept);
    take(request, 0);
}

// What becomes of the first that waits when it cannot run: it waits, is tried again, or ends.
void Engine::failed(Request& request, const Error& error) {
    if (error.code() == L2A_ERROR_OUT_OF_MEMORY && !rows_.empty()) {
        full_ = static_cast<std::int64_t>(rows_.size());  // a row that ends makes room
        return;
    }
    if (error.code() != L2A_ERROR_SESSION || ++request.failures >= kTries) end(request, error.code(), error.what());
}

// Takes a request out of its row to the head of the queue: it is computed again from its tokens.
void Engine::interrupt(Request& request) {
    remove(request.row);
    waiting_.push_front(&request);
    ++recomputed_;
}

void Engine::retire() {
    for (std::size_t row = rows_.size(); row-- > 0;) {
        if (rows_[row]->done()) remove(static_cast<std::int64_t>(row));
    }
    if (rows_.empty()) full_ = -1;
}

// The last row takes the place of one that leaves.
void Engine::remove(std::int64_t row) {
    Request* last = rows_.back();
    rows_.pop_back();
    Request*& place = row == last->row ? last : rows_[static_cast<std::size_t>(row)];
    place->row = -1;
    if (place == last) return;
    caches_.copy(static_cast<std::int64_t>(rows_.size()), row, last->length);
    ++copied_;
    last->row = row;
    place = last;
}

// Rows of one graph come to stand beside one another, where they do not.
void Engine::arrange() {
    for (std::size_t place = 1; place + 1 < rows_.size(); ++place) {
        const Graph* before = rows_[place - 1]->graph;
        if (rows_[place]->graph == before) continue;
        const auto from = rows_.begin() + static_cast<std::ptrdiff_t>(place);
        const auto later = std::find_if(from, rows_.end(), [&](const Request* row) { return row->graph == before; });
        if (later == rows_.end()) continue;
        caches_.swap((*from)->row, (*later)->row, std::max((*from)->length, (*later)->length));
        copied_ += 2;
        std::swap((*from)->row, (*later)->row);
        std::iter_swap(from, later);
    }
}

void Engine::decode() {
    std::int64_t longest = 0;  // a cap may have been raised since a request came
    for (const Request* request : rows_) longest = std::max(longest, request->length + 1);
    try {
        caches_.reserve(static_cast<std::int64_t>(rows_.size()), longest);
    } catch (const Error& error) {
        return stumbled(0, rows_.size(), error);
    }
    if (options_.variants) arrange();
    for (std::size_t start = 0; start < rows_.size();) {
        const Graph& graph = *rows_[start]->graph;
        std::size_t count = 1;
        while (!graph.is_narrow() && start + count < rows_.size() && rows_[start + count]->graph == &graph) ++count;
        try {
            decode_rows(graph, start, count);
            stumbles_ = 0;
        } catch (const Error& error) {
            return stumbled(start, count, error);
        }
        start += count;
    }
}

// One token of some rows of one graph.
void Engine::decode_rows(const Graph& graph, std::size_t start, std::size_t count) {
    const std::vector<Request*> requests(rows_.begin() + static_cast<std::ptrdiff_t>(start),
                                         rows_.begin() + static_cast<std::ptrdiff_t>(start + count));
    fill(requests);
    std::int64_t total = 0;
    for (const Request* request : requests) total = std::max(total, request->length + 1);
    arrays_.ids.clear();
    arrays_.mask.clear();
    for (const Request* request : requests) {
        arrays_.ids.push_back(request->written.back());
        for (std::int64_t place = 0; place < total; ++place) arrays_.mask.push_back(place <= request->length ? 1 : 0);
    }
    Run run = run_of(static_cast<std::int64_t>(count), 1, total);
    run.caches = &caches_.view(graph, static_cast<std::int64_t>(start), static_cast<std::int64_t>(count));
    graph.run(run);
    for (std::size_t row = 0; row < count; ++row) {
        ++requests[row]->length;
        if (!requests[row]->done()) take(*requests[row], row);
    }
}

// A step that failed is run again: with a row less where memory was short.
void Engine::stumbled(std::size_t start, std::size_t count, const Error& error) {
    if (error.code() == L2A_ERROR_OUT_OF_MEMORY && rows_.size() > 1) {
        Request* newest = *std::max_element(rows_.begin(), rows_.end(),
                                            [](const Request* one, const Request* other) { return one->id < other->id; });
        interrupt(*newest);
        full_ = static_cast<std::int64_t>(rows_.size());
        return;
    }
    if (error.code() == L2A_ERROR_SESSION && ++stumbles_ < kTries) return;
    stumbles_ = 0;
    for (std::size_t row = start; row < start + count; ++row) end(*rows_[row], error.code(), error.what());
}

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
    request.written.push_back(request.reasoning.advance(request.sampler.token(logits, words), stop));
}

void Engine::end(Request& request, l2a_code error, const std::string& message) {
    request.reasoning.stage = Reasoning::Stage::done;
    request.error = error;
    request.message = message;
}

}  // namespace l2a::core
