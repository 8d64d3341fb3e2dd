// The rules of a selector and the cost table it decides with, as JSON. See docs/selector.md.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace l2a::core {

struct Tier {
    double floor = 0.0;
    double ceiling = 1.0;
};

struct Policy {
    enum class Kind { fixed, min, slack };

    Kind kind = Kind::min;
    double time_margin = 0.1;
    double spot_grace_seconds = 5.0;
    double target_seconds = 10.0;
    double tpot_seconds = 0.0;
    double short_share = 0.5;
    double pressure_low = 0.2;
    double pressure_high = 0.8;
    std::vector<std::string> pressures{"pressure.cpu_some", "gpu.throttled", "service.contention"};
    std::vector<std::string> memories{"gpu.memory_free", "cgroup.memory_available", "host.memory_available"};
    double memory_reserve_bytes = 0.0;
    double patience_seconds = 30.0;
    double dwell_seconds = 4.0;
    std::int64_t buckets = 8;
    double stale_seconds = 30.0;
    std::map<std::string, Tier> tiers{{"priority", {0.8, 1.0}}, {"default", {0.0, 1.0}}, {"flex", {0.0, 0.6}}};

    // Every key may be left out. Throws a config error for an unknown key or a value out of range.
    static Policy parse(std::string_view text);
    // Throws a config error where there is no such tier.
    [[nodiscard]] const Tier& tier(const std::string& name) const;
};

struct Work {
    double prompt_tokens = 0;
    double new_tokens = 0;
    double think_tokens = 0;
    double rows = 1;
};

// A row of the cost table: what one budget of the ladder costs on this machine.
struct CostStep {
    double budget = 1.0;
    std::int64_t layers = 0;
    std::int64_t heads = 0;
    double prefill_seconds = 0.0;  // of one token of a prompt
    double decode_seconds = 0.0;   // of one token after it, of one row alone
    double row_seconds = 0.0;      // what each more row adds to that step
    double memory_bytes = 0.0;     // to run at all, caches not counted
    double cache_bytes = 0.0;      // of one token of one sequence

    [[nodiscard]] double step_seconds(double rows) const { return decode_seconds + (rows - 1) * row_seconds; }
    // From a request's first token to its last, beside the other rows.
    [[nodiscard]] double seconds(const Work& work) const {
        return work.prompt_tokens * prefill_seconds + work.new_tokens * step_seconds(work.rows);
    }
    // That a request costs the machine: its share of the steps that it runs in.
    [[nodiscard]] double busy_seconds(const Work& work) const {
        return work.prompt_tokens * prefill_seconds + work.new_tokens * step_seconds(work.rows) / work.rows;
    }
};

using CostSteps = std::vector<CostStep>;

// The `steps` of a cost table, whose other keys are let be. Throws a config error; budgets must fall.
CostSteps parse_costs(std::string_view text);

}  // namespace l2a::core
