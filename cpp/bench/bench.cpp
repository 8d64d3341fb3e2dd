// One engine in a process of its own, asked over standard input, as benchmarks/native.py does:
//
//     l2a_bench BUNDLE THREADS GRAPHS     GRAPHS: a sum of L2A_GRAPH_*
//
// Each line {"task": ..., "serve": "if" | "variants", ...} is answered by one line of JSON. Times are in seconds.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <iostream>
#include <l2a/l2a.hpp>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point began) {
    return std::chrono::duration<double>(Clock::now() - began).count();
}

double cpu_seconds() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Kilobytes of this process's memory, as the kernel counts them.
Json memory() {
    std::ifstream file("/proc/self/smaps_rollup");
    Json found;
    for (std::string name; file >> name;) {
        long kilobytes = 0;
        if ((name == "Pss:" || name == "Anonymous:") && file >> kilobytes)
            found[name.substr(0, name.size() - 1)] = kilobytes;
    }
    return found;
}

class Bench {
  public:
    explicit Bench(const l2a::Runtime& runtime) : runtime_(runtime), think_(runtime.model().think) {}

    Json run(const Json& asked) {
        const std::string task = asked["task"].get<std::string>();
        if (task == "memory") return memory();
        if (task == "step") return step(asked);
        if (task == "switch") return change(asked);
        if (task == "threads") return threads(asked);
        if (task == "serve") return serve(asked);
        throw std::runtime_error("no such task: " + task);
    }

  private:
    const l2a::Runtime& runtime_;
    int64_t think_;
    std::mt19937 draw_{0};

    l2a::Engine engine(const Json& asked, int32_t rows) const {
        l2a::EngineOptions options;
        options.serve = asked["serve"] == "variants" ? L2A_SERVE_VARIANTS : L2A_SERVE_IF;
        options.max_rows = rows;
        return l2a::Engine(runtime_, options);
    }

    // Never the same twice.
    std::vector<int64_t> prompt(std::size_t size) {
        std::vector<int64_t> ids(size);
        std::uniform_int_distribution<int64_t> any(10, runtime_.model().vocab_size / 2);
        for (int64_t& id : ids) id = any(draw_);
        ids.back() = think_;
        return ids;
    }

    static l2a::RequestOptions options(double compute, int64_t tokens) {
        l2a::RequestOptions found;
        found.budget = l2a::budget(compute);
        found.max_think_tokens = tokens;
        found.tau_threshold = -1;
        return found;
    }

    // Processor time of `batch` prompts of `length` tokens: of the first step, which computes them, less a decode step;
    // and of a decode step.
    Json step(const Json& asked) {
        const auto batch = asked["batch"].get<int32_t>();
        const auto tokens = asked["tokens"].get<int64_t>();
        const double budget = asked.value("budget", 1.0);
        l2a::Engine engine = this->engine(asked, batch);
        for (int32_t row = 0; row < batch; ++row) {
            (void)engine.submit(prompt(asked["length"].get<std::size_t>()), options(budget, tokens + 8));
        }
        const double began = cpu_seconds();
        engine.step();
        const double first = cpu_seconds() - began;
        engine.step();
        const double warm = cpu_seconds();
        int64_t count = 0;
        for (; count < tokens && engine.statistics().running == batch; ++count) engine.step();
        const double decode = (cpu_seconds() - warm) / static_cast<double>(std::max<int64_t>(1, count));
        while (asked.value("finish", false) && engine.statistics().running > 0) engine.step();
        return {{"prefill", first - decode}, {"decode", decode}};
    }

    // Budgets that change in the middle of a request, in the order given, over and over.
    Json change(const Json& asked) {
        std::vector<double> calls, after, plain, firsts;
        const auto budgets = asked["budgets"].get<std::vector<double>>();
        const auto length = asked["length"].get<std::size_t>();
        for (int round = 0; round < asked["rounds"].get<int>(); ++round) {
            l2a::Engine engine = this->engine(asked, 1);
            const l2a::Request request = engine.submit(prompt(length), options(budgets.front(), 200));
            engine.step();
            for (int turn = 0; turn < asked.value("turns", 1); ++turn) {
                for (std::size_t at = 1; at < budgets.size() && !request.done(); ++at) {
                    auto began = Clock::now();
                    engine.step();
                    plain.push_back(since(began));
                    began = Clock::now();
                    request.set_budget(l2a::budget(budgets[at]));
                    (turn == 0 ? firsts : calls).push_back(since(began));
                    began = Clock::now();
                    engine.step();
                    after.push_back(since(began));
                }
            }
        }
        return {{"first", firsts}, {"again", calls}, {"after", after}, {"plain", plain}};
    }

    // Requests of which `rows` may run at a time, to their ends; `blind`: whatever memory is left.
    Json serve(const Json& asked) {
        l2a::EngineOptions wanted;
        wanted.max_rows = asked["rows"].get<int32_t>();
        const auto everything = [] { return std::numeric_limits<double>::infinity(); };
        l2a::Engine engine(runtime_, wanted, asked["blind"] ? everything : std::function<double()>());
        std::vector<l2a::Request> requests;
        const auto length = asked["length"].get<std::size_t>();
        while (requests.size() < asked["requests"].get<std::size_t>())
            requests.push_back(engine.submit(prompt(length), options(1.0, asked["tokens"].get<int64_t>())));
        const auto began = Clock::now();
        int64_t most = 0;
        while (engine.step()) most = std::max(most, engine.statistics().running);
        Json found{{"seconds", since(began)}, {"most_rows", most}, {"again", engine.statistics().recomputed_rows}};
        for (const l2a::Request& request : requests) {
            found["errors"].push_back(request.info().error);
            found["tokens"].push_back(request.tokens());
        }
        return found;
    }

    // Processor time and time of a token where so many threads have an engine each.
    Json threads(const Json& asked) {
        const auto count = asked["threads"].get<std::size_t>();
        const auto tokens = asked["tokens"].get<int64_t>();
        std::vector<l2a::Engine> engines;
        for (std::size_t at = 0; at < count; ++at) {
            engines.push_back(engine(asked, 1));
            (void)engines.back().submit(prompt(32), options(1.0, tokens + 8));
            engines.back().step();
        }
        const double cpu = cpu_seconds();
        const auto began = Clock::now();
        std::vector<std::thread> running;
        for (l2a::Engine& one : engines) {
            running.emplace_back([&one, tokens] {
                for (int64_t at = 0; at < tokens; ++at) one.step();
            });
        }
        for (std::thread& thread : running) thread.join();
        const double each = static_cast<double>(count) * static_cast<double>(tokens);
        return {{"cpu", (cpu_seconds() - cpu) / each}, {"wall", since(began) / each}};
    }
};

}  // namespace

int main(int count, char** arguments) {
    try {
        if (count != 4) throw std::runtime_error("usage: l2a_bench BUNDLE THREADS GRAPHS");
        l2a::RuntimeOptions options;
        options.threads = std::stoi(arguments[2]);
        options.graphs = static_cast<uint32_t>(std::stoul(arguments[3]));
        const l2a::Runtime runtime(arguments[1], options);
        Bench bench(runtime);
        std::cout << Json{{"ready", true}} << std::endl;
        for (std::string line; std::getline(std::cin, line);) std::cout << bench.run(Json::parse(line)) << std::endl;
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "l2a_bench: " << error.what() << '\n';
        return 1;
    }
}
