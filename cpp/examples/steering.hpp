// What a request with the budget "auto" may spend now: signals and queue -> selector -> budget.
#pragma once

#include <algorithm>
#include <chrono>
#include <fstream>
#include <l2a/l2a.hpp>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

inline std::string text_of(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

// One thread at a time.
class Steering {
  public:
    // `costs` is the file of a cost table, as `l2a bench --out` writes it. All graphs share one copy of the weights, so
    // what the largest step takes is held from the start.
    Steering(const l2a::Runtime& runtime, const std::string& costs) : selector_(text_of(costs)) {
        for (const auto& step : nlohmann::json::parse(text_of(costs)).at("steps")) {
            held_ = std::max(held_, step.at("memory_bytes").get<double>());
        }
        think_ = nlohmann::json::parse(runtime.manifest()).at("gates").at("think_reference").get<int64_t>();
    }

    // Decides ten times a second at most; between that it is the last decision.
    const l2a_decision& decide(const l2a::Engine& served, int64_t prompt_tokens) {
        const double now = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
        if (now - last_ < 0.1) return decision_;
        last_ = now;
        const l2a_engine_stats engine = served.statistics();  // looks at all pages of the caches
        std::vector<l2a::Reading> readings = signals_.read();
        for (l2a::Reading& reading : readings) {  // what this process holds would be free for another step
            if (reading.name.find("memory_available") != std::string::npos) {
                reading.value += held_ + static_cast<double>(engine.held_bytes);
            }
        }
        readings.push_back({"queue.depth", "count", static_cast<double>(engine.waiting), ""});
        readings.push_back({"queue.oldest_seconds", "seconds", engine.oldest_seconds, ""});
        // What a request is expected to write; a service of its own would learn it from what requests wrote.
        const auto think = static_cast<double>(think_);
        const l2a_work work{prompt_tokens, think + 16, think, engine.running > 0 ? engine.running : 1};
        decision_ = selector_.decide(readings, work, state_, now);
        state_ = decision_.state;
        return decision_;
    }

  private:
    l2a::Selector selector_;
    l2a::Signals signals_;  // of no GPU: engines run on the processor
    l2a_selector_state state_ = l2a::Selector::start();
    l2a_decision decision_{};
    double last_ = -1.0;
    double held_ = 0.0;  // bytes
    int64_t think_ = 0;  // tokens that models are trained to reason with, at most
};
