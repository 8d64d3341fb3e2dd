/**
 * @file l2a.hpp
 * @brief C++17 over l2a.h: owners, exceptions and values. Header-only, so it adds nothing to the interface of the
 * library.
 *
 *     l2a::Runtime runtime("bundle");
 *     l2a::Engine engine(runtime);
 *     l2a::RequestOptions options;
 *     options.budget.compute = 0.6;
 *     const l2a::Request request = engine.submit(prompt, options);
 *     while (engine.step()) {}
 *     std::vector<int64_t> answer = request.tokens(l2a::Part::answer);
 *
 * Threads and ownership are those of l2a.h: a Runtime and a Selector may be used by many threads, an Engine, its
 * requests and Signals by one at a time. A Request is a number of its engine and must not outlive it.
 */
#ifndef L2A_L2A_HPP_
#define L2A_L2A_HPP_

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "l2a/l2a.h"

namespace l2a {

/** What a failed call throws; the code is that of l2a.h. */
class Error : public std::runtime_error {
  public:
    Error(l2a_code code, const std::string& message) : std::runtime_error(message), code_(code) {}
    [[nodiscard]] l2a_code code() const noexcept { return code_; }

  private:
    l2a_code code_;
};

/** Throws what a status says, and frees it. */
inline void check(l2a_status* status) {
    if (status == nullptr) return;
    const std::unique_ptr<l2a_status, void (*)(l2a_status*)> owner(status, l2a_status_free);
    throw Error(l2a_status_code(status), l2a_status_message(status));
}

using Budget = l2a_budget;

/** All that the model has, without caps. */
inline Budget full_budget() noexcept {
    return {1.0, -1, -1, -1};
}
/** A share of the dense compute, without caps. */
inline Budget budget(double compute) noexcept {
    return {compute, -1, -1, -1};
}

/** @see l2a_runtime_options */
struct RuntimeOptions : l2a_runtime_options {
    RuntimeOptions() noexcept { l2a_runtime_options_init(this, sizeof(l2a_runtime_options)); }
};
/** @see l2a_engine_options */
struct EngineOptions : l2a_engine_options {
    EngineOptions() noexcept { l2a_engine_options_init(this, sizeof(l2a_engine_options)); }
};
/** @see l2a_request_options */
struct RequestOptions : l2a_request_options {
    RequestOptions() noexcept { l2a_request_options_init(this, sizeof(l2a_request_options)); }
};

/** An open bundle. Any thread. */
class Runtime {
  public:
    explicit Runtime(const std::string& folder, const RuntimeOptions& options = {}) {
        l2a_runtime* made = nullptr;
        check(l2a_runtime_open(folder.c_str(), &options, &made));
        runtime_.reset(made);
    }
    [[nodiscard]] l2a_model_info model() const {
        l2a_model_info info{};
        info.struct_size = sizeof info;
        check(l2a_runtime_model(get(), &info));
        return info;
    }
    /** Text of manifest.json. */
    [[nodiscard]] std::string manifest() const { return l2a_runtime_manifest(get()); }
    /** Names of the open graphs. */
    [[nodiscard]] std::vector<std::string> graphs() const {
        std::vector<std::string> found;
        for (size_t at = 0; at < l2a_runtime_graph_count(get()); ++at) {
            found.emplace_back(l2a_runtime_graph_name(get(), at));
        }
        return found;
    }
    [[nodiscard]] l2a_runtime* get() const noexcept { return runtime_.get(); }

  private:
    struct Free {
        void operator()(l2a_runtime* runtime) const noexcept { l2a_runtime_free(runtime); }
    };
    std::unique_ptr<l2a_runtime, Free> runtime_;
};

/** Verifies a bundle without loading a graph. Throws Error. */
inline void verify(const std::string& folder) {
    check(l2a_verify(folder.c_str()));
}

/** Parts of what is written. */
enum class Part { written = L2A_TOKENS_WRITTEN, think = L2A_TOKENS_THINK, answer = L2A_TOKENS_ANSWER };

/** A request of an engine; copies mean the same request. */
class Request {
  public:
    Request(l2a_engine* engine, uint64_t id) noexcept : engine_(engine), id_(id) {}
    [[nodiscard]] uint64_t id() const noexcept { return id_; }
    [[nodiscard]] l2a_request_info info() const {
        l2a_request_info info{};
        info.struct_size = sizeof info;
        check(l2a_engine_info(engine_, id_, &info));
        return info;
    }
    /** Whether nothing more will be written. Throws what went wrong, once it is done. */
    [[nodiscard]] bool done() const {
        const l2a_request_info found = info();
        if (found.error != L2A_OK) throw Error(static_cast<l2a_code>(found.error), l2a_engine_error(engine_, id_));
        return found.done != 0;
    }
    /** Token ids so far. */
    [[nodiscard]] std::vector<int64_t> tokens(Part part = Part::written) const {
        size_t size = 0;
        const int64_t* found = l2a_engine_tokens(engine_, id_, static_cast<int32_t>(part), &size);
        return found == nullptr ? std::vector<int64_t>{} : std::vector<int64_t>(found, found + size);
    }
    /** From its next token on. Throws Error, and the old budget stays. */
    void set_budget(const Budget& budget) const { check(l2a_engine_set_budget(engine_, id_, &budget)); }
    void cancel() const { check(l2a_engine_cancel(engine_, id_)); }
    /** Frees what is kept of it; it must not be used any more. */
    void forget() const { check(l2a_engine_forget(engine_, id_)); }

  private:
    l2a_engine* engine_;
    uint64_t id_;
};

/** Continuous batching over a runtime, which it keeps open. One thread at a time. */
class Engine {
  public:
    /** @param memory_left in the place of the option of this name, where given; one that throws says NAN. */
    explicit Engine(const Runtime& runtime, EngineOptions options = {}, std::function<double()> memory_left = {}) {
        if (memory_left) {
            memory_left_ = std::make_unique<std::function<double()>>(std::move(memory_left));
            options.memory_left = ask;
            options.memory_context = memory_left_.get();
        }
        l2a_engine* made = nullptr;
        check(l2a_engine_create(runtime.get(), &options, &made));
        engine_.reset(made);
    }
    /** Queues token ids that end in `<think>`. Throws Error, and nothing is queued. */
    [[nodiscard]] Request submit(const std::vector<int64_t>& prompt, const RequestOptions& options = {}) {
        uint64_t id = 0;
        check(l2a_engine_submit(get(), prompt.data(), prompt.size(), &options, &id));
        return {get(), id};
    }
    /** One token of every row. Returns whether a request still waits or runs. */
    bool step() {
        int32_t busy = 0;
        check(l2a_engine_step(get(), &busy));
        return busy != 0;
    }
    [[nodiscard]] l2a_engine_stats statistics() const {
        l2a_engine_stats stats{};
        stats.struct_size = sizeof stats;
        check(l2a_engine_statistics(get(), &stats));
        return stats;
    }
    [[nodiscard]] l2a_engine* get() const noexcept { return engine_.get(); }

  private:
    struct Free {
        void operator()(l2a_engine* engine) const noexcept { l2a_engine_free(engine); }
    };
    static double ask(void* function) noexcept {
        try {
            return (*static_cast<std::function<double()>*>(function))();
        } catch (...) {
            return std::numeric_limits<double>::quiet_NaN();
        }
    }
    std::unique_ptr<std::function<double()>> memory_left_;
    std::unique_ptr<l2a_engine, Free> engine_;
};

/** A reading that is a value of its own. */
struct Reading {
    std::string name;
    std::string unit;
    double value = std::numeric_limits<double>::quiet_NaN(); /**< NaN where it is not available */
    std::string why;
};

/** What the machine has left. One thread at a time. */
class Signals {
  public:
    /** @param gpu index or UUID; "" for none. @param root of the file system, for tests. */
    explicit Signals(const std::string& gpu = "", const std::string& root = "") {
        l2a_signals* made = nullptr;
        check(l2a_signals_create(root.empty() ? nullptr : root.c_str(), gpu.empty() ? nullptr : gpu.c_str(), &made));
        signals_.reset(made);
    }
    [[nodiscard]] std::vector<Reading> read() {
        const l2a_reading* readings = nullptr;
        size_t size = 0;
        check(l2a_signals_read(signals_.get(), &readings, &size));
        std::vector<Reading> found;
        for (size_t at = 0; at < size; ++at) {
            found.push_back({readings[at].name, readings[at].unit, readings[at].value, readings[at].why});
        }
        return found;
    }

  private:
    struct Free {
        void operator()(l2a_signals* signals) const noexcept { l2a_signals_free(signals); }
    };
    std::unique_ptr<l2a_signals, Free> signals_;
};

/** What to run now. Any thread. */
class Selector {
  public:
    /** @param costs JSON of a cost table. @param policy JSON, "" for the default policy. */
    explicit Selector(const std::string& costs, const std::string& policy = "") {
        l2a_selector* made = nullptr;
        check(l2a_selector_create(policy.empty() ? nullptr : policy.c_str(), costs.c_str(), &made));
        selector_.reset(made);
    }
    /** The state before the first decision. */
    static l2a_selector_state start() noexcept {
        return {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::quiet_NaN()};
    }
    /** @see l2a_selector_decide. @param reasons NULL, or gets a JSON list of all terms. */
    [[nodiscard]] l2a_decision decide(const std::vector<Reading>& readings, const l2a_work& work,
                                      const l2a_selector_state& state, double now, const std::string& tier = "default",
                                      const l2a_work* urgent = nullptr, std::string* reasons = nullptr) const {
        std::vector<l2a_reading> given;
        for (const Reading& reading : readings) {
            given.push_back({reading.name.c_str(), reading.unit.c_str(), reading.value, reading.why.c_str()});
        }
        l2a_decision decision{};
        decision.struct_size = sizeof decision;
        char* text = nullptr;
        check(l2a_selector_decide(selector_.get(), tier.c_str(), given.data(), given.size(), &work, urgent, &state, now,
                                  &decision, reasons == nullptr ? nullptr : &text));
        if (reasons != nullptr) *reasons = text;
        l2a_text_free(text);
        return decision;
    }

  private:
    struct Free {
        void operator()(l2a_selector* selector) const noexcept { l2a_selector_free(selector); }
    };
    std::unique_ptr<l2a_selector, Free> selector_;
};

}  // namespace l2a

#endif  // L2A_L2A_HPP_
