// Continuous batching over a runtime: requests of any budget and length come and go between steps.
//
//     waiting --prefill, one by one, into a free row of the caches--> running --decode, all rows together--> done
//        ^                                                               |
//        +---- memory is short, or the new budget needs other caches ----+
//
// A row's computation does not depend on the others, so neither does its text. One thread at a time; engines over one
// runtime share nothing that is written. The rules are those of l2a_compress/runtime/engine.py.
#pragma once

#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <unordered_map>

#include "caches.hpp"
#include "request.hpp"
#include "runtime.hpp"

namespace l2a::core {

struct EngineOptions {
    bool variants = false;  // served by static variants instead of the If graph
    std::int64_t max_rows = 8;
    std::int64_t max_cache_bytes = 0;     // 0: any
    std::function<double()> memory_left;  // bytes, NaN where nobody knows; none: of the machine
};

class Engine {
  public:
    Engine(std::shared_ptr<const Runtime> runtime, const EngineOptions& options);

    // Queues a request and returns its number. Throws Error (budget, config), and nothing is queued.
    std::uint64_t submit(std::vector<std::int64_t> prompt, const Budget& budget, const Limits& limits,
                         const Sampling& sampling);
    // Changes what a request may spend from its next token on. Throws Error, and the old budget stays.
    void set_budget(Request& request, const Budget& budget);
    void cancel(Request& request);
    void forget(std::uint64_t id);
    // Admits what there is room for and writes one token of every row.
    void step();

    // Throws Error (config) where there is no such request.
    [[nodiscard]] Request& request(std::uint64_t id) const;
    [[nodiscard]] const Runtime& runtime() const noexcept { return *runtime_; }
    [[nodiscard]] bool busy() const;
    [[nodiscard]] std::int64_t waiting() const { return static_cast<std::int64_t>(waiting_.size()); }
    [[nodiscard]] std::int64_t running() const;
    [[nodiscard]] double oldest_seconds() const;
    [[nodiscard]] std::int64_t cache_bytes() const { return caches_.bytes(); }
    [[nodiscard]] std::int64_t held_bytes() const { return caches_.held(); }
    [[nodiscard]] std::int64_t copied_rows() const { return copied_; }
    [[nodiscard]] std::int64_t recomputed_rows() const { return recomputed_; }

  private:
    std::shared_ptr<const Runtime> runtime_;
    EngineOptions options_;
    std::vector<const Graph*> graphs_;  // that requests may run on
    Caches caches_;
    std::unordered_map<std::uint64_t, std::unique_ptr<Request>> requests_;
    std::deque<Request*> waiting_;
    std::vector<Request*> rows_;
    std::vector<std::pair<Told, Widths>> chosen_;  // where all prompts get the same
    std::int64_t full_ = -1;                       // so many rows were too many; -1: not known
    double since_ = 0.0;                           // when they were, seconds
    std::uint64_t next_ = 0;
    std::int64_t copied_ = 0;
    std::int64_t recomputed_ = 0;
    double looked_ = -std::numeric_limits<double>::infinity();  // at the memory that is left, seconds

    // Inputs and outputs of one run.
    struct Arrays {
        std::vector<std::int64_t> ids, mask, limits, allocation, kept, variant;
        std::vector<float> budget, price, logits, tau;
    };
    Arrays arrays_;

    [[nodiscard]] Told told(const Budget& budget) const;
    // Whether there are positions for a prompt, so much reasoning and so long an answer.
    void check(const std::vector<std::int64_t>& prompt, std::int64_t think, std::int64_t answer) const;
    // Places of the variants that keep to a budget, the largest first.
    [[nodiscard]] std::vector<std::size_t> fitting(const Budget& budget) const;
    // KV groups of each layer that a prompt gets under a budget.
    Widths choose(Request& request, const Budget& budget, const Told& told);
    // What was chosen by what was told, the allocation of each: for a request, or for all of them.
    std::vector<std::pair<Told, Widths>>& choices(Request& request, const Told& told);
    void remember(Request& request, const Told& told, const Widths& kept);
    Widths fixed(const Request& request, const Budget& budget, Told told);
    void route(const Request& request, const Told& told);
    [[nodiscard]] const Graph* graph_of(const Widths& kept) const;

    void admit_all();
    bool admit(Request& request);
    void crowded();
    [[nodiscard]] bool beyond(std::int64_t rows, std::int64_t tokens) const;
    [[nodiscard]] double unwritten(const Request* more = nullptr) const;
    [[nodiscard]] double scratch(const Request& request) const;
    void squeeze();
    void make_room(std::int64_t rows, std::int64_t tokens);
    [[nodiscard]] std::vector<std::int64_t> lengths() const;
    void prefill(Request& request);
    void failed(Request& request, const Error& error);
    void interrupt(Request& request);
    void retire();
    void rest();
    void remove(std::int64_t row);
    void arrange();
    void decode();
    bool grow();
    bool decode_rows(std::size_t start, std::size_t count);
    void run_rows(std::size_t start, std::size_t count);
    bool stumbled(std::size_t start, std::size_t count, const Error& error);
    void fill(const std::vector<Request*>& requests);
    Run run_of(std::int64_t batch, std::int64_t sequence, std::int64_t total);
    void take(Request& request, std::size_t row);
    void end(Request& request, l2a_code error = L2A_OK, const char* message = "") noexcept;
};

}  // namespace l2a::core
