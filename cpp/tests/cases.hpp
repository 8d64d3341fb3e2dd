// What make_cases.py wrote: requests, and what the Python runtime writes for them.
#pragma once

#include <fstream>
#include <l2a/l2a.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace cases {

using Json = nlohmann::json;

inline Json read(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    return Json::parse(file);
}

struct Change {
    std::size_t after;  // tokens
    double compute;
};

struct Case {
    std::string bundle;
    bool variants = false;
    std::vector<int64_t> prompt;
    l2a::RequestOptions options;
    std::vector<Change> changes;
    std::vector<int64_t> written;
    std::vector<int64_t> kept;
    std::size_t think = 0;
    int stopped_by = 0;
};

inline Case parse(const Json& data) {
    Case found;
    found.bundle = data["bundle"].get<std::string>();
    found.variants = data["serve"] == "variants";
    found.prompt = data["prompt"].get<std::vector<int64_t>>();
    found.options.budget = l2a::budget(data["budget"].get<double>());
    if (!data["think_tokens"].is_null()) found.options.budget.think_tokens = data["think_tokens"].get<int64_t>();
    found.options.max_think_tokens = data["limits"][0].get<int64_t>();
    found.options.max_answer_tokens = data["limits"][1].get<int64_t>();
    found.options.tau_threshold = data["limits"][2].get<double>();
    found.options.temperature = data["sampling"][0].get<double>();
    found.options.top_k = data["sampling"][1].get<int64_t>();
    found.options.top_p = data["sampling"][2].get<double>();
    found.options.seed = data["sampling"][3].get<uint64_t>();
    for (const Json& change : data["changes"]) {
        found.changes.push_back({change[0].get<std::size_t>(), change[1].get<double>()});
    }
    const Json& expect = data["expect"];
    found.written = expect["written"].get<std::vector<int64_t>>();
    found.kept = expect["kept"].get<std::vector<int64_t>>();
    found.think = expect["think"].get<std::size_t>();
    found.stopped_by = expect["stopped_by"].get<int>();
    return found;
}

inline const Json& all() {
    static const Json found = read(std::string(L2A_CASES) + "/cases.json");
    return found;
}

// All cases of a bundle served in one way.
inline std::vector<Case> of(const std::string& bundle, bool variants) {
    std::vector<Case> found;
    for (const Json& data : all()["cases"]) {
        Case one = parse(data);
        if (one.bundle == bundle && one.variants == variants) found.push_back(std::move(one));
    }
    return found;
}

inline std::string folder(const std::string& bundle) {
    return std::string(L2A_CASES) + "/" + bundle;
}

inline l2a::Runtime open(const std::string& bundle) {
    l2a::RuntimeOptions options;
    options.threads = 1;
    return l2a::Runtime(folder(bundle), options);
}

inline l2a::Engine engine(const l2a::Runtime& runtime, bool variants, int32_t rows) {
    l2a::EngineOptions options;
    options.serve = variants ? L2A_SERVE_VARIANTS : L2A_SERVE_IF;
    options.max_rows = rows;
    return l2a::Engine(runtime, options);
}

// A request on its way through its changes of budget.
class Running {
  public:
    Running(l2a::Engine& engine, const Case& asked)
        : asked_(&asked), request_(engine.submit(asked.prompt, asked.options)) {}
    // Changes the budget where it is time to. Returns whether it is done.
    bool follow() {
        while (next_ < asked_->changes.size() && request_.tokens().size() >= asked_->changes[next_].after &&
               !request_.done()) {
            request_.set_budget(l2a::budget(asked_->changes[next_++].compute));
        }
        return request_.done();
    }
    [[nodiscard]] bool matches(const l2a::Engine& engine) const {
        const int64_t* kept = l2a_engine_allocation(engine.get(), request_.id());
        return request_.tokens() == asked_->written && request_.info().stopped_by == asked_->stopped_by &&
               request_.tokens(l2a::Part::think).size() == asked_->think &&
               std::equal(asked_->kept.begin(), asked_->kept.end(), kept);
    }
    void forget() const { request_.forget(); }

  private:
    const Case* asked_;
    l2a::Request request_;
    std::size_t next_ = 0;
};

// How many of the cases give what Python gives, in an engine of so many rows.
inline std::size_t equal(l2a::Engine& engine, const std::vector<Case>& all, std::size_t together) {
    std::size_t found = 0;
    std::size_t next = 0;
    std::vector<Running> running;
    while (next < all.size() || !running.empty()) {
        while (next < all.size() && running.size() < together) running.emplace_back(engine, all[next++]);
        engine.step();
        for (std::size_t at = running.size(); at-- > 0;) {
            if (!running[at].follow()) continue;
            found += running[at].matches(engine) ? 1U : 0U;
            running[at].forget();
            running.erase(running.begin() + static_cast<std::ptrdiff_t>(at));
        }
    }
    return found;
}

}  // namespace cases
