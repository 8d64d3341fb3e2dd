// The think and answer format of one request, as l2a_compress/reasoning.py has it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bundle.hpp"

namespace l2a::core {

constexpr std::int64_t kWrittenTags = 3;  // behind the prompt

class Reasoning {
  public:
    enum class Stage { think, bridge, answer, done };

    Reasoning(const Tags& tags, std::int64_t most_think, std::int64_t most_answer)
        : cap(most_think), max_answer(most_answer), tags_(tags) {}

    std::int64_t cap;         // most tokens of reasoning
    std::int64_t max_answer;  // most tokens of the answer
    Stage stage = Stage::think;
    int stopped_by = L2A_STOPPED_BY_MODEL;
    std::vector<std::int64_t> think;   // without tags
    std::vector<std::int64_t> answer;  // without tags

    // Whether the next token is the answer's first, which must not end it: an answer is never empty.
    [[nodiscard]] bool begins_answer() const noexcept { return stage == Stage::answer && answer.empty(); }

    // Takes the token that the model proposes, and returns the one that is fed next. `stop`: the transition gate ends
    // the reasoning here.
    std::int64_t advance(std::int64_t proposed, bool stop) {
        if (stage == Stage::think) {
            const bool full = static_cast<std::int64_t>(think.size()) >= cap;
            const bool tag = proposed == tags_.end_think || proposed == tags_.answer || proposed == tags_.end_answer;
            if (!tag && !full && !stop) {
                think.push_back(proposed);
                return proposed;
            }
            if (proposed != tags_.end_think) {
                stopped_by = full ? L2A_STOPPED_BY_CAP : stop ? L2A_STOPPED_BY_TAU : L2A_STOPPED_BY_MODEL;
            }
            stage = Stage::bridge;
            return tags_.end_think;
        }
        if (stage == Stage::bridge) {
            stage = Stage::answer;
            return tags_.answer;
        }
        const bool room = static_cast<std::int64_t>(answer.size()) < max_answer;
        if (stage == Stage::answer && proposed != tags_.end_answer && room) {
            answer.push_back(proposed);
            return proposed;
        }
        stage = Stage::done;  // what is fed to a row that is done no longer matters
        return tags_.end_answer;
    }

  private:
    Tags tags_;
};

}  // namespace l2a::core
