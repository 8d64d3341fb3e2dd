#include "policy.hpp"

#include "json.hpp"

namespace l2a::core {
namespace {

constexpr Check policy_check{L2A_ERROR_CONFIG};

Json parsed(std::string_view text, const std::string& what) {
    try {
        return parse_json(text);
    } catch (const std::invalid_argument& error) {
        config_error(what + ": not JSON (" + error.what() + ")");
    }
}

double bounded(const Json& value, const std::string& name, double most) {
    const double found = policy_check.number(value, name);
    if (!(found >= 0.0 && found <= most)) config_error(name + " is out of range, found " + shown(value));
    return found;
}

std::vector<std::string> names(const Json& value, const std::string& name) {
    if (!value.is_array()) config_error(name + " must be a list of signal names, found " + shown(value));
    std::vector<std::string> found;
    for (const Json& item : value) {
        if (!item.is_string()) config_error(name + " must be a list of signal names, found " + shown(value));
        found.push_back(item.get<std::string>());
    }
    return found;
}

Tier tier_of(const Json& data, const std::string& name) {
    policy_check.keys(data, name, {"floor", "ceiling"}, {"floor", "ceiling"});
    Tier tier;
    if (data.contains("floor")) tier.floor = bounded(data["floor"], name + ".floor", 1.0);
    if (data.contains("ceiling")) tier.ceiling = bounded(data["ceiling"], name + ".ceiling", 1.0);
    if (tier.ceiling == 0 || tier.floor > tier.ceiling) {
        config_error(name + ": the ceiling must be above 0 and the floor");
    }
    return tier;
}

struct Number {
    const char* name;
    double Policy::*field;
    double most;
};

constexpr double kAny = 1.7976931348623157e308;
const Number kNumbers[] = {
    {"time_margin", &Policy::time_margin, 0.99},
    {"spot_grace_seconds", &Policy::spot_grace_seconds, kAny},
    {"target_seconds", &Policy::target_seconds, kAny},
    {"tpot_seconds", &Policy::tpot_seconds, kAny},
    {"short_share", &Policy::short_share, 1.0},
    {"pressure_low", &Policy::pressure_low, 1.0},
    {"pressure_high", &Policy::pressure_high, 1.0},
    {"memory_reserve_bytes", &Policy::memory_reserve_bytes, kAny},
    {"patience_seconds", &Policy::patience_seconds, kAny},
    {"dwell_seconds", &Policy::dwell_seconds, kAny},
    {"stale_seconds", &Policy::stale_seconds, kAny},
};

void read_rest(const Json& data, Policy& policy) {
    if (data.contains("kind")) {
        const Json& kind = data["kind"];
        if (kind != "fixed" && kind != "min" && kind != "slack") {
            config_error("policy.kind must be one of fixed, min, slack, found " + shown(kind));
        }
        policy.kind = kind == "fixed" ? Policy::Kind::fixed : kind == "min" ? Policy::Kind::min : Policy::Kind::slack;
    }
    if (data.contains("pressures")) policy.pressures = names(data["pressures"], "policy.pressures");
    if (data.contains("memories")) policy.memories = names(data["memories"], "policy.memories");
    if (data.contains("buckets")) policy.buckets = policy_check.integer(data["buckets"], "policy.buckets", 1);
    if (!data.contains("tiers")) return;
    if (!data["tiers"].is_object()) config_error("policy.tiers must be a table, found " + shown(data["tiers"]));
    for (const auto& item : data["tiers"].items()) {
        policy.tiers[item.key()] = tier_of(item.value(), "policy.tiers." + item.key());
    }
}

double cost(const Json& data, const char* name, const std::string& step, bool zero) {
    const double found = policy_check.number(data[name], step + "." + name);
    if (!(found > 0.0 || (zero && found == 0.0))) config_error(step + "." + name + " must be above 0");
    return found;
}

CostStep step_of(const Json& data, const std::string& what) {
    policy_check.keys(data, what,
                      {"budget", "layers", "heads", "prefill_seconds", "decode_seconds", "memory_bytes", "cache_bytes",
                       "row_seconds"},
                      {"row_seconds"});
    CostStep step;
    step.budget = policy_check.share(data["budget"], what + ".budget");
    step.layers = policy_check.integer(data["layers"], what + ".layers", 1);
    step.heads = policy_check.integer(data["heads"], what + ".heads", 1);
    step.prefill_seconds = cost(data, "prefill_seconds", what, false);
    step.decode_seconds = cost(data, "decode_seconds", what, false);
    step.memory_bytes = cost(data, "memory_bytes", what, true);
    step.cache_bytes = cost(data, "cache_bytes", what, true);
    if (data.contains("row_seconds")) step.row_seconds = cost(data, "row_seconds", what, true);
    return step;
}

}  // namespace

Policy Policy::parse(std::string_view text) {
    const Json data = parsed(text, "policy");
    std::vector<std::string> known{"kind", "pressures", "memories", "buckets", "tiers"};
    for (const Number& number : kNumbers) known.emplace_back(number.name);
    policy_check.keys(data, "policy", known, known);
    Policy policy;
    for (const Number& number : kNumbers) {
        if (data.contains(number.name)) {
            policy.*number.field = bounded(data[number.name], std::string("policy.") + number.name, number.most);
        }
    }
    read_rest(data, policy);
    if (!(policy.pressure_low < policy.pressure_high)) {
        config_error("policy.pressure_low must be below pressure_high");
    }
    return policy;
}

const Tier& Policy::tier(const std::string& name) const {
    const auto found = tiers.find(name);
    if (found != tiers.end()) return found->second;
    std::string known;
    for (const auto& [tier, rule] : tiers) known += (known.empty() ? "" : ", ") + tier;
    config_error("tier " + shown(name) + ": the policy has " + known);
}

CostSteps parse_costs(std::string_view text) {
    const Json data = parsed(text, "cost table");
    if (!data.is_object() || !data.contains("steps") || !data["steps"].is_array() || data["steps"].empty()) {
        config_error("a cost table is an object with at least one step in `steps`; make one with `l2a bench`");
    }
    CostSteps steps;
    for (const Json& step : data["steps"]) {
        steps.push_back(step_of(step, "steps[" + std::to_string(steps.size()) + "]"));
        if (steps.size() > 1 && steps[steps.size() - 2].budget <= steps.back().budget) {
            config_error("a cost table needs steps whose budgets fall from one to the next; measure it again");
        }
    }
    return steps;
}

}  // namespace l2a::core
