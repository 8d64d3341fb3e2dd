#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "capi.hpp"
#include "json.hpp"
#include "selector.hpp"

struct l2a_selector {
    l2a::core::Policy policy;
    l2a::core::CostSteps steps;
};

namespace {

using l2a::core::given;

l2a::core::Work work_of(const l2a_work& work) {
    const bool counts = work.new_tokens >= 0 && work.think_tokens >= 0 && std::isfinite(work.new_tokens) &&
                        std::isfinite(work.think_tokens);
    if (work.prompt_tokens < 0 || !counts || work.rows < 1) {
        l2a::core::config_error("work: tokens must be finite and at least 0, and rows at least 1");
    }
    return {static_cast<double>(work.prompt_tokens), work.new_tokens, work.think_tokens,
            static_cast<double>(work.rows)};
}

std::optional<double> known(double value) {
    return std::isnan(value) ? std::nullopt : std::optional<double>(value);
}
double plain(std::optional<double> value) {
    return value.value_or(std::numeric_limits<double>::quiet_NaN());
}

struct Free {
    void operator()(char* text) const noexcept { std::free(text); }
};
using Text = std::unique_ptr<char, Free>;

char* reasons_of(const std::vector<l2a::core::Term>& terms) {
    l2a::core::Json list = l2a::core::Json::array();
    for (const l2a::core::Term& term : terms) {
        list.push_back(
            {{"name", term.name}, {"budget", term.budget}, {"reason", term.reason}, {"short", term.is_short}});
    }
    const std::string text = list.dump();
    char* copy = static_cast<char*>(std::malloc(text.size() + 1));
    if (copy == nullptr) throw std::bad_alloc();
    std::memcpy(copy, text.c_str(), text.size() + 1);
    return copy;
}

}  // namespace

l2a_status* l2a_selector_create(const char* policy, const char* costs, l2a_selector** out) {
    return l2a::core::guarded([&] {
        given(out, "out");
        l2a::core::Policy rules = policy == nullptr ? l2a::core::Policy{} : l2a::core::Policy::parse(policy);
        l2a::core::CostSteps steps = l2a::core::parse_costs(&given(costs, "costs"));
        *out = new l2a_selector{std::move(rules), std::move(steps)};
    });
}

void l2a_selector_free(l2a_selector* selector) {
    delete selector;
}

l2a_status* l2a_selector_decide(const l2a_selector* selector, const char* tier, const l2a_reading* readings,
                                size_t size, const l2a_work* work, const l2a_work* urgent,
                                const l2a_selector_state* state, double now, l2a_decision* decision, char** reasons) {
    return l2a::core::guarded([&] {
        l2a::core::Readings values;
        for (size_t at = 0; at < size; ++at) {
            const l2a_reading& reading = (&given(readings, "readings"))[at];
            if (!std::isnan(reading.value)) values[&given(reading.name, "a reading's name")] = reading.value;
        }
        const l2a::core::Work asked = work_of(given(work, "work"));
        const l2a::core::SelectorState before =
            state == nullptr ? l2a::core::SelectorState{}
                             : l2a::core::SelectorState{known(state->budget), known(state->since)};
        const l2a::core::Decision found =
            l2a::core::select(given(selector, "selector").steps, values, asked, selector->policy, before, now,
                              tier == nullptr ? "default" : tier, urgent == nullptr ? asked : work_of(*urgent));
        Text text(reasons == nullptr ? nullptr : reasons_of(found.terms));
        l2a::core::write_struct<l2a_decision>({0,
                                               l2a::core::shown(found.budget),
                                               static_cast<int64_t>(found.step),
                                               found.admit ? 1 : 0,
                                               found.binding().name,
                                               {plain(found.state.budget), plain(found.state.since)}},
                                              decision);
        if (reasons != nullptr) *reasons = text.release();
    });
}

void l2a_text_free(char* text) {
    std::free(text);
}
