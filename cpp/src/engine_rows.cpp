// Rows: who gets one, runs on, moves and leaves.
#include <algorithm>

#include "engine.hpp"

namespace l2a::core {
namespace {

constexpr int kTries = 3;  // of a run that fails for another reason than memory

// A lack of memory of this library's own is like one of ONNX Runtime's.
template <typename Action>
auto with_memory(Action&& action) {
    try {
        return action();
    } catch (const std::bad_alloc&) {
        throw Error(L2A_ERROR_OUT_OF_MEMORY, "there is not enough memory for a step; free some, or lower the limits");
    } catch (const std::length_error&) {
        throw Error(L2A_ERROR_OUT_OF_MEMORY, "there cannot be enough memory for a step; lower the limits");
    }
}

}  // namespace

void Engine::step() {
    retire();
    admit_all();
    retire();
    if (rows_.empty()) return;
    decode();
    const auto done = [](const Request* request) { return request->done(); };
    if (waiting_.empty() && std::all_of(rows_.begin(), rows_.end(), done)) give_back();  // what prompts took
}

void Engine::admit_all() {
    while (!waiting_.empty() && static_cast<std::int64_t>(rows_.size()) < options_.max_rows &&
           (full_ < 0 || static_cast<std::int64_t>(rows_.size()) < full_)) {
        full_ = -1;
        Request& request = *waiting_.front();
        waiting_.pop_front();
        try {
            if (with_memory([&] { return admit(request); })) continue;
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
    const std::int64_t tokens = request.most_tokens();
    if (used == 0 && beyond(rows, tokens)) caches_ = Caches(graphs_);  // what others needed does not count
    const std::int64_t many = std::min(options_.max_rows, 2 * rows - 1);
    if (rows > caches_.rows() && !beyond(many, tokens)) rows = many;  // to grow seldom
    if (beyond(rows, tokens)) {
        const std::int64_t bytes = caches_.bytes_for(rows, tokens);
        if (used > 0) return false;
        throw Error(L2A_ERROR_OUT_OF_MEMORY, "request " + std::to_string(request.id) + ": " + std::to_string(bytes) +
                                                 " bytes of keys and values are more than max_cache_bytes, " +
                                                 std::to_string(options_.max_cache_bytes) + "; lower its limits");
    }
    caches_.reserve(rows, tokens);
    prefill(request);
    return true;
}

bool Engine::beyond(std::int64_t rows, std::int64_t tokens) const {
    return options_.max_cache_bytes > 0 && caches_.bytes_for(rows, tokens) > options_.max_cache_bytes;
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
    if (request.kept.empty()) request.kept = arrays_.kept;
    remember(request, request.told, request.kept);
    request.length = size;
    request.row = row;
    rows_.push_back(&request);  // there is room: nothing fails from here on
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
    const auto rows = static_cast<std::int64_t>(rows_.size());
    try {
        if (longest > caches_.capacity() && beyond(rows, longest)) {
            throw Error(L2A_ERROR_OUT_OF_MEMORY, "keys and values would be more than max_cache_bytes, " +
                                                     std::to_string(options_.max_cache_bytes) + "; lower the limits");
        }
        caches_.reserve(rows, longest);
    } catch (const Error& error) {
        stumbled(0, rows_.size(), error);
        return;
    }
    if (options_.variants) arrange();
    for (std::size_t start = 0; start < rows_.size();) {
        const Graph& graph = *rows_[start]->graph;
        std::size_t count = 1;
        while (!graph.is_narrow() && start + count < rows_.size() && rows_[start + count]->graph == &graph) ++count;
        try {
            with_memory([&] { decode_rows(graph, start, count); });
            stumbles_.erase(&graph);
        } catch (const Error& error) {
            if (stumbled(start, count, error)) return;  // rows have moved: the others wait for the next step
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
        if (!requests[row]->done()) take(*requests[row], row);
        ++requests[row]->length;
    }
}

// A step of some rows of one graph that failed is run again: with a row less where memory was short. Says whether rows
// have moved.
bool Engine::stumbled(std::size_t start, std::size_t count, const Error& error) {
    const Graph* graph = rows_[start]->graph;
    if (error.code() == L2A_ERROR_OUT_OF_MEMORY && rows_.size() > 1) {
        Request* newest = nullptr;
        for (std::size_t row = start; row < start + count; ++row) {
            Request* one = rows_[row];
            if (!one->done() && (newest == nullptr || one->id > newest->id)) newest = one;
        }
        if (newest == nullptr) return false;
        interrupt(*newest);
        full_ = static_cast<std::int64_t>(rows_.size());
        return true;
    }
    if (error.code() == L2A_ERROR_SESSION && ++stumbles_[graph] < kTries) return false;
    stumbles_.erase(graph);
    for (std::size_t row = start; row < start + count; ++row) {
        if (!rows_[row]->done()) end(*rows_[row], error.code(), error.what());
    }
    return false;
}

}  // namespace l2a::core
