#include "selector.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace l2a::core {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr double kMostTokens = 0x1p62;  // that a budget counts

std::string text(double value) {
    char buffer[32];  // as %g writes it, whatever the locale
    const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::general, 6).ptr;
    return {buffer, end};
}

std::optional<double> reading(const Readings& readings, const std::string& name) {
    const auto found = readings.find(name);
    return found == readings.end() ? std::nullopt : std::optional<double>(found->second);
}

// The largest step of at most `budget`, else the smallest of all.
const CostStep& below(const CostSteps& steps, double budget) {
    const auto found =
        std::find_if(steps.begin(), steps.end(), [&](const auto& step) { return step.budget <= budget; });
    return found == steps.end() ? steps.back() : *found;
}

// The smallest step of at least `budget`, else the largest of all.
const CostStep& above(const CostSteps& steps, double budget) {
    const auto found =
        std::find_if(steps.rbegin(), steps.rend(), [&](const auto& step) { return step.budget >= budget; });
    return found == steps.rend() ? steps.front() : *found;
}

// Budget of the largest step that takes no longer than `room`, else of the smallest of all.
template <typename Seconds>
double largest(const CostSteps& steps, Seconds seconds, double room) {
    const auto found =
        std::find_if(steps.begin(), steps.end(), [&](const auto& step) { return seconds(step) <= room; });
    return found == steps.end() ? steps.back().budget : found->budget;
}

// The lower edge of the latency bucket that the slack falls into, as in SlackFit of SuperServe (Khare et al., NSDI
// 2025): equal slacks must not pick unlike steps because of noise.
double bucket(const CostSteps& steps, const Work& work, double room, std::int64_t count) {
    const double least = steps.back().seconds(work);
    const double most = steps.front().seconds(work);
    if (!(least < room && room < most)) return room;
    const double width = (most - least) / static_cast<double>(count);
    return least + std::floor((room - least) / width) * width;
}

// One selection: what is asked, and the terms so far.
class Selection {
  public:
    Selection(const CostSteps& steps, const Readings& readings, const Work& work, const Policy& policy,
              const Tier& rule)
        : steps_(steps),
          readings_(readings),
          work_(work),
          policy_(policy),
          ceiling_(below(steps, rule.ceiling).budget),
          floor_(std::min(ceiling_, above(steps, rule.floor).budget)),
          free_(1 - std::min(0.99, reading(readings, "service.contention").value_or(0.0))) {
        terms.push_back({"policy", ceiling_, "ceiling " + text(rule.ceiling)});
    }

    std::vector<Term> terms;

    // What each signal but memory allows.
    void weigh(const Work& urgent) {
        if (policy_.kind == Policy::Kind::fixed) return;
        deadline("time", "request.seconds_left", urgent, 0.0);
        deadline("spot", "spot.seconds_left", work_, policy_.spot_grace_seconds);
        queue();
        if (policy_.tpot_seconds > 0) {
            const double found = largest(
                steps_, [&](const auto& step) { return step.step_seconds(work_.rows); }, policy_.tpot_seconds * free_);
            add({"pace", found, text(work_.rows) + " rows, a token in " + text(policy_.tpot_seconds) + " s each"});
        }
        if (policy_.kind != Policy::Kind::slack) pressure();
    }

    // The largest step that fits into what is left. Where none does it is the largest of those that take least, as going
    // below it saves no memory, and false is returned.
    bool memory() {
        double room = kInfinite;
        for (const std::string& name : policy_.memories)
            room = std::min(room, reading(readings_, name).value_or(kInfinite));
        if (room == kInfinite) return true;
        const double left = room - policy_.memory_reserve_bytes;
        const double tokens = work_.rows * (work_.prompt_tokens + work_.new_tokens);
        const auto need = [&](const auto& step) { return step.memory_bytes + tokens * step.cache_bytes; };
        const double least = need(*std::min_element(
            steps_.begin(), steps_.end(), [&](const auto& one, const auto& other) { return need(one) < need(other); }));
        const double most = std::max(least, left);
        const auto found =
            std::find_if(steps_.begin(), steps_.end(), [&](const auto& step) { return need(step) <= most; });
        const auto& step = found == steps_.end() ? steps_.back() : *found;  // needs may be no numbers
        terms.push_back({"memory", step.budget, text(room) + " bytes are left"});
        return least <= left;
    }

    // A squeeze acts on its own axis: what its term's step has of it.
    [[nodiscard]] std::optional<std::int64_t> cap(const std::string& name, std::int64_t CostStep::*count) const {
        const auto found =
            std::find_if(terms.begin(), terms.end(), [&](const Term& term) { return name == term.name; });
        if (found == terms.end() || !(found->budget < ceiling_)) return std::nullopt;
        return below(steps_, found->budget).*count;
    }

  private:
    const CostSteps& steps_;
    const Readings& readings_;
    const Work& work_;
    const Policy& policy_;
    double ceiling_;
    double floor_;
    double free_;  // of the machine; the table was measured with all

    void add(Term term) {
        term.budget = std::max(term.budget, floor_);
        terms.push_back(std::move(term));
    }

    // The largest step that is done within `room`: short reasoning comes before less compute.
    template <typename Seconds>
    void timed(const char* name, std::string reason, const Work& work, double room, Seconds seconds) {
        Term term{name,
                  largest(
                      steps_, [&](const auto& step) { return seconds(step, work); }, room),
                  std::move(reason)};
        if (term.budget < ceiling_ && policy_.short_share < 1 && work.think_tokens != 0) {
            Work brief = work;
            brief.new_tokens -= work.think_tokens * (1 - policy_.short_share);
            term.budget = largest(
                steps_, [&](const auto& step) { return seconds(step, brief); }, room);
            term.is_short = true;
        }
        add(std::move(term));
    }

    void deadline(const char* name, const char* signal, const Work& asked, double grace) {
        const double left = reading(readings_, signal).value_or(kInfinite);
        if (!(left < kInfinite)) return;
        double room = std::max(0.0, left - grace) * (1 - policy_.time_margin) * free_;
        if (policy_.kind == Policy::Kind::slack && std::string(name) == "time") {
            room = bucket(steps_, asked, room, policy_.buckets);
        }
        timed(name, text(left) + " s are left", asked, room,
              [](const CostStep& step, const Work& work) { return step.seconds(work); });
    }

    // The last one must be done within the target, and the first one, whose time has run for a while.
    void queue() {
        const auto depth = reading(readings_, "queue.depth");
        if (!depth) return;
        const double oldest = reading(readings_, "queue.oldest_seconds").value_or(0.0);
        timed("queue", text(*depth) + " wait, the oldest for " + text(oldest) + " s", work_,
              policy_.target_seconds * free_, [&](const CostStep& step, const Work& work) {
                  const double busy = step.busy_seconds(work);
                  return std::max((work.rows + *depth) * busy, work.rows * busy + oldest * free_);
              });
    }

    void pressure() {
        const std::string* highest = nullptr;
        double most = 0.0;
        for (const std::string& name : policy_.pressures) {
            const auto value = reading(readings_, name);
            if (value && (highest == nullptr || *value > most)) {
                highest = &name;
                most = *value;
            }
        }
        if (highest == nullptr) return;
        const double low = policy_.pressure_low;
        const double share = std::clamp((most - low) / (policy_.pressure_high - low), 0.0, 1.0);
        const double wanted = steps_.front().budget - share * (steps_.front().budget - floor_);
        add({"pressure", below(steps_, wanted).budget, *highest + " is " + text(most)});
    }
};

}  // namespace

const Term& Decision::binding() const {
    return *std::min_element(terms.begin(), terms.end(), [](const Term& one, const Term& other) {
        return one.budget != other.budget ? one.budget < other.budget : one.is_short && !other.is_short;
    });
}

Decision select(const CostSteps& steps, const Readings& readings, const Work& work, const Policy& policy,
                const SelectorState& state, double now, const std::string& tier, const Work& urgent) {
    Selection selection(steps, readings, work, policy, policy.tier(tier));
    selection.weigh(urgent);
    Decision found;
    found.admit = selection.memory();
    double allowed = kInfinite;
    bool is_short = false;
    for (const Term& term : selection.terms) {
        allowed = std::min(allowed, term.budget);
        is_short = is_short || term.is_short;
    }
    double budget = allowed;
    if (state.budget && allowed > *state.budget && policy.dwell_seconds > 0) {  // up by one step, after a while
        found.state.since = state.since.value_or(now);
        budget = *state.budget;
        if (now - *found.state.since >= policy.dwell_seconds) {
            for (const CostStep& step : steps) budget = step.budget > *state.budget ? step.budget : budget;
            found.state.since = budget < allowed ? std::optional<double>(now) : std::nullopt;
        }
        if (budget < allowed) {
            const double waited = state.since ? now - *state.since : 0.0;
            selection.terms.push_back({"dwell", budget, text(allowed) + " is allowed for " + text(waited) + " s"});
        }
    }
    const CostStep& step = below(steps, budget);
    found.step = static_cast<std::size_t>(&step - steps.data());
    found.budget.compute = step.budget;
    found.budget.layers = selection.cap("memory", &CostStep::layers);
    found.budget.heads = selection.cap("pressure", &CostStep::heads);
    if (is_short)
        found.budget.think_tokens =
            static_cast<std::int64_t>(std::min(std::floor(work.think_tokens * policy.short_share), kMostTokens));
    found.state.budget = step.budget;
    found.terms = std::move(selection.terms);
    return found;
}

}  // namespace l2a::core
