// Rows: who gets one, runs on, moves and leaves.
#include <algorithm>

#include "engine.hpp"
#include "signals.hpp"

namespace l2a::core {
namespace {

constexpr int kTries = 3;       // of a run that fails for another reason than memory
constexpr double kLook = 0.2;   // seconds between two looks at the memory that is left for rows that run
constexpr double kAgain = 2.0;  // seconds until it is tried again whether there is room for a row more

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

// For a message.
std::string digits(double bytes) {
    return std::to_string(static_cast<std::int64_t>(std::clamp(bytes, 0.0, 9e18)));
}

}  // namespace

void Engine::step() {
    admit_all();
    retire();
    squeeze();
    if (!rows_.empty()) decode();
    retire();
    rest();
}

void Engine::admit_all() {
    while (!waiting_.empty() && static_cast<std::int64_t>(rows_.size()) < options_.max_rows &&
           (full_ < 0 || static_cast<std::int64_t>(rows_.size()) < full_ || steady_seconds() - since_ >= kAgain)) {
        full_ = -1;
        Request& request = *waiting_.front();
        try {
            if (!with_memory([&] { return admit(request); })) {
                crowded();
                break;
            }
        } catch (const Error& error) {
            failed(request, error);
            if (!request.done()) continue;
        }
        waiting_.pop_front();  // behind all that may fail, so that no request is lost
    }
}

// There is no room for a row more until one ends, or memory is left again. What rows of before took is given back.
void Engine::crowded() {
    full_ = static_cast<std::int64_t>(rows_.size());
    since_ = steady_seconds();
    try {
        caches_.trim(lengths());
    } catch (const std::bad_alloc&) {  // not even for that
    }
}

// False where it must wait for memory.
bool Engine::admit(Request& request) {
    if (options_.variants && request.kept.empty()) request.kept = choose(request, request.budget, request.told);
    request.graph = options_.variants ? graph_of(request.kept) : graphs_.front();
    const auto used = static_cast<std::int64_t>(rows_.size());
    std::int64_t rows = used + 1;
    const std::int64_t tokens = request.most_tokens();
    if (used == 0) caches_.clear();  // what others needed does not count
    const double need = unwritten(&request) + scratch(request);
    const double left = options_.memory_left();
    if (need > left) {
        if (used > 0) return false;
        throw Error(L2A_ERROR_OUT_OF_MEMORY,
                    "request " + std::to_string(request.id) + ": " + digits(need) +
                        " bytes for its keys and values and to compute its prompt, of which " + digits(left) +
                        " are left; free some, shorten the prompt, or lower its limits");
    }
    const std::int64_t many = std::min(options_.max_rows, 2 * rows - 1);
    const bool fits = !beyond(many, tokens) && !(caches_.bytes_for(many, tokens) > left);
    if (rows > caches_.rows() && fits) rows = many;  // to grow seldom
    if (beyond(rows, tokens)) {
        const double bytes = caches_.bytes_for(rows, tokens);
        if (used > 0) return false;
        throw Error(L2A_ERROR_OUT_OF_MEMORY, "request " + std::to_string(request.id) + ": " + digits(bytes) +
                                                 " bytes of keys and values are more than max_cache_bytes, " +
                                                 std::to_string(options_.max_cache_bytes) + "; lower its limits");
    }
    make_room(rows, tokens);
    prefill(request);
    return true;
}

bool Engine::beyond(std::int64_t rows, std::int64_t tokens) const {
    return options_.max_cache_bytes > 0 && caches_.bytes_for(rows, tokens) > static_cast<double>(options_.max_cache_bytes);
}

// Bytes that keys and values of all rows may still take, and of one more where it is given.
double Engine::unwritten(const Request* more) const {
    std::vector<Caches::Extent> extents;
    for (const Request* request : rows_) extents.push_back({request->graph, request->most_tokens()});
    if (more != nullptr) extents.push_back({more->graph, more->most_tokens()});
    return static_cast<double>(caches_.unwritten(extents));
}

// Bytes that computing a request's tokens takes for a while: twice what one layer makes of them, at fp32.
double Engine::scratch(const Request& request) const {
    const Shape& shape = runtime_->manifest().shape;
    const auto tokens = static_cast<double>(request.prompt.size() + request.written.size());
    return 2 * 4 * tokens *
           (4 * static_cast<double>(shape.hidden_size) + 3 * static_cast<double>(shape.intermediate_size));
}

// Interrupts the newest rows, where what all rows may still write does not fit any more.
void Engine::squeeze() {
    const double now = steady_seconds();
    if (rows_.size() < 2 || now - looked_ < kLook) return;
    looked_ = now;
    const auto older = [](const Request* one, const Request* other) { return one->id < other->id; };
    while (rows_.size() > 1 && unwritten() > options_.memory_left()) {
        interrupt(**std::max_element(rows_.begin(), rows_.end(), older));
        crowded();
    }
}

// Makes room in the caches for so many rows of so many tokens; the rows keep what they have written.
void Engine::make_room(std::int64_t rows, std::int64_t tokens) {
    caches_.reserve(rows, tokens, lengths());
}

// Tokens that each row has in the caches.
std::vector<std::int64_t> Engine::lengths() const {
    std::vector<std::int64_t> found;
    for (const Request* request : rows_) found.push_back(request->length);
    return found;
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
    caches_.mark(*request.graph, row, size);
    request.graph->run(run);
    if (request.kept.empty()) request.kept = arrays_.kept;
    remember(request, request.told, request.kept);
    take(request, 0);  // before it has a row: there it must have a token to go on from
    request.length = size;
    request.row = row;
    request.failures = 0;
    rows_.push_back(&request);  // there is room: nothing fails from here on
}

// What becomes of the first that waits when it cannot run: it waits, is tried again, or ends.
void Engine::failed(Request& request, const Error& error) {
    if (error.code() == L2A_ERROR_OUT_OF_MEMORY && !rows_.empty()) {
        crowded();
        return;
    }
    if (error.code() != L2A_ERROR_SESSION || ++request.failures >= kTries) end(request, error.code(), error.what());
}

// Takes a request out of its row to the head of the queue: it is computed again from its tokens.
void Engine::interrupt(Request& request) {
    waiting_.push_front(&request);  // first, as it may fail: then all is as it was
    remove(request.row);
    request.failures = 0;
    ++recomputed_;
}

void Engine::retire() {
    for (std::size_t row = rows_.size(); row-- > 0;) {
        if (rows_[row]->done()) remove(static_cast<std::int64_t>(row));
    }
    if (rows_.empty()) full_ = -1;
}

// Without rows all memory of keys and values goes back, however the last one ended.
void Engine::rest() {
    if (!rows_.empty() || caches_.rows() == 0) return;
    caches_.clear();
    if (waiting_.empty()) give_back();  // what prompts took
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
    if (!grow()) return;
    if (options_.variants) arrange();
    for (std::size_t start = 0; start < rows_.size();) {
        const Graph& graph = *rows_[start]->graph;
        std::size_t count = 1;
        while (!graph.is_narrow() && start + count < rows_.size() && rows_[start + count]->graph == &graph) ++count;
        if (!decode_rows(start, count)) return;  // rows have moved: the others wait for the next step
        start += count;
    }
}

// Makes room for a token more of every row: a cap may have been raised since a request came. Where there is none the
// longest leaves its row, and false is returned. It gets a row again where all that it may write fits, in new caches
// once it is alone, or its error.
bool Engine::grow() {
    const auto longest = std::max_element(rows_.begin(), rows_.end(), [](const Request* one, const Request* other) {
        return one->length < other->length;
    });
    const std::int64_t tokens = (*longest)->length + 1;
    const auto rows = static_cast<std::int64_t>(rows_.size());
    if (tokens <= caches_.capacity()) return true;
    try {
        if (!beyond(rows, tokens) && !(unwritten() > options_.memory_left())) {
            with_memory([&] { make_room(rows, tokens); });
            return true;
        }
    } catch (const Error&) {  // the system has no more
    }
    interrupt(**longest);
    crowded();
    return false;
}

// One token of some rows of one graph. False where rows have moved.
bool Engine::decode_rows(std::size_t start, std::size_t count) {
    try {
        with_memory([&] { run_rows(start, count); });
        return true;
    } catch (const Error& error) {
        return stumbled(start, count, error);
    }
}

void Engine::run_rows(std::size_t start, std::size_t count) {
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
    const Graph& graph = *requests.front()->graph;
    Run run = run_of(static_cast<std::int64_t>(count), 1, total);
    run.caches = &caches_.view(graph, static_cast<std::int64_t>(start), static_cast<std::int64_t>(count));
    for (const Request* request : requests) caches_.mark(graph, request->row, request->length + 1);
    graph.run(run);
    for (std::size_t row = 0; row < count; ++row) {
        take(*requests[row], row);
        ++requests[row]->length;
        requests[row]->failures = 0;
    }
}

// What becomes of rows whose step failed: it is run again, with a row less where memory was short. In the end each is
// run alone, and those that fail so end. False where rows have moved.
bool Engine::stumbled(std::size_t start, std::size_t count, const Error& error) {
    if (error.code() == L2A_ERROR_OUT_OF_MEMORY && rows_.size() > 1) {
        Request* newest = rows_[start];
        for (std::size_t row = start + 1; row < start + count; ++row) {  // some may have got their last token
            Request* one = rows_[row];
            if (!one->done() && (newest->done() || one->id > newest->id)) newest = one;
        }
        interrupt(*newest);
        crowded();
        return false;
    }
    bool last = error.code() != L2A_ERROR_SESSION;
    for (std::size_t row = start; row < start + count; ++row) last = ++rows_[row]->failures >= kTries || last;
    if (!last) return true;
    if (count == 1) {
        end(*rows_[start], error.code(), error.what());
        return true;
    }
    for (std::size_t row = start; row < start + count; ++row) {
        if (!decode_rows(row, 1)) return false;
    }
    return true;
}

}  // namespace l2a::core
