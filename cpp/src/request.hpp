// One text that is being written, and how far it may go.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cost.hpp"
#include "graph.hpp"
#include "reasoning.hpp"
#include "sampling.hpp"

namespace l2a::core {

struct Limits {
    std::int64_t max_think_tokens = 160;
    std::int64_t max_answer_tokens = 16;
    double tau_threshold = 0.9;  // below 0: the transition gate is not asked

    // Throws a config error where a value is out of range.
    void check() const;
    // Most tokens of reasoning under a budget.
    [[nodiscard]] std::int64_t cap(const Budget& budget) const {
        return std::min(max_think_tokens, budget.think_tokens.value_or(max_think_tokens));
    }
};

struct Request {
    Request(std::uint64_t number, std::vector<std::int64_t> tokens, const Budget& spend, const Limits& most,
            const Told& what, const Tags& tags, const Sampling& sampling)
        : id(number),
          prompt(std::move(tokens)),
          budget(spend),
          limits(most),
          told(what),
          reasoning(tags, most.cap(spend), most.max_answer_tokens),
          sampler(sampling) {}

    std::uint64_t id;
    std::vector<std::int64_t> prompt;
    Budget budget;
    Limits limits;
    Told told;
    Reasoning reasoning;
    Sampler sampler;
    bool asks_gate = false;  // whether the transition gate may end its reasoning
    double submitted = 0.0;  // seconds of the engine's clock

    Widths kept;  // KV groups of each layer; empty before that is decided
    const Graph* graph = nullptr;
    std::vector<std::int64_t> written;  // all tokens, tags included
    std::int64_t length = 0;            // tokens in the caches
    std::int64_t row = -1;              // of the caches; -1 where it has none
    int failures = 0;                   // runs that failed, one after another
    l2a_code error = L2A_OK;
    std::string message;
    std::vector<std::pair<Told, Widths>> chosen;  // by the gates or the ladder, by what was told

    // Makes room for all that it may write under a cap, so that no step of many fails for want of it.
    void reserve(std::int64_t cap) {
        reasoning.think.reserve(static_cast<std::size_t>(cap));
        reasoning.answer.reserve(static_cast<std::size_t>(reasoning.max_answer));
        written.reserve(static_cast<std::size_t>(most_tokens(cap)) - prompt.size());
    }
    [[nodiscard]] bool done() const noexcept { return reasoning.stage == Reasoning::Stage::done; }
    // How long prompt and text can become under the budget of now, whose cap may be below what is written.
    [[nodiscard]] std::int64_t most_tokens() const noexcept { return most_tokens(reasoning.cap); }
    [[nodiscard]] std::int64_t most_tokens(std::int64_t cap) const noexcept {
        const auto think = std::max(cap, static_cast<std::int64_t>(reasoning.think.size()));
        return static_cast<std::int64_t>(prompt.size()) + think + reasoning.max_answer + kWrittenTags;
    }
};

}  // namespace l2a::core
