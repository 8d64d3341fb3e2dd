// What to run now: a pure function of the readings, the cost table, the policy and the state before. The rules are
// those of docs/selector.md, checked by tests/golden/selection_cases.json. Nothing here reads a clock, a file or a
// device.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cost.hpp"
#include "policy.hpp"

namespace l2a::core {

using Readings = std::map<std::string, double>;  // without those that are not available

struct SelectorState {
    std::optional<double> budget;  // of the last decision
    std::optional<double> since;   // when all signals began to allow more than that, in seconds
};

// What one signal allows. Names are constants: policy, memory, time, spot, queue, pace, pressure, dwell.
struct Term {
    const char* name = "";
    double budget = 1.0;
    std::string reason;
    bool is_short = false;  // with short reasoning
};

struct Decision {
    Budget budget;
    std::size_t step = 0;
    bool admit = true;
    std::vector<Term> terms;
    SelectorState state;

    // The first of the terms that allow least; with short reasoning is less than without.
    [[nodiscard]] const Term& binding() const;
};

// `steps` is not empty and falls. `urgent` is what is left of the request that has request.seconds_left. Throws a
// config error where the policy has no such tier.
Decision select(const CostSteps& steps, const Readings& readings, const Work& work, const Policy& policy,
                const SelectorState& state, double now, const std::string& tier, const Work& urgent);

}  // namespace l2a::core
