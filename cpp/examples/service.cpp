// An HTTP service of many threads over one engine: an example application.
//
//     l2a_service BUNDLE PORT [COSTS.json]
//
//     POST /generate {"prompt": [ids], "budget": 0.6 | "auto", "max_think_tokens": 64, "temperature": 0.8, "seed": 1}
//       -> {"think": [ids], "answer": [ids], "budget": 0.6, "cost": 0.58, "layers": 7}
//     GET /health -> {"waiting": 0, "running": 1, "cache_bytes": 1048576}
//
//     HTTP threads --job--> inbox --> one thread that owns the engine: submit, step, answer --> HTTP threads
#include <httplib.h>

#include <algorithm>
#include <condition_variable>
#include <future>
#include <iostream>
#include <l2a/l2a.hpp>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <vector>

#include "steering.hpp"

namespace {

using Json = nlohmann::json;

// There is no memory for even the smallest step.
class Refused : public std::runtime_error {
  public:
    Refused() : std::runtime_error("there is no memory for another request; try again later") {}
};

// An engine in a thread of its own; callers come from any thread and wait for their answer.
class Service {
  public:
    Service(const l2a::Runtime& runtime, const std::string& costs)
        : engine_(runtime), steering_(costs.empty() ? nullptr : std::make_unique<Steering>(runtime, costs)) {
        thread_ = std::thread([this] { run(); });
    }
    ~Service() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            closed_ = true;
        }
        wake_.notify_all();
        thread_.join();
    }
    Service(const Service&) = delete;
    Service& operator=(const Service&) = delete;

    // Throws what went wrong.
    Json generate(Json asked) {
        Job job{std::move(asked), {}, {}};
        std::future<Json> answer = job.answer.get_future();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            inbox_.push_back(std::move(job));
        }
        wake_.notify_all();
        return answer.get();
    }

    Json health() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return {{"waiting", stats_.waiting}, {"running", stats_.running}, {"cache_bytes", stats_.cache_bytes}};
    }

  private:
    struct Job {
        Json asked;
        std::promise<Json> answer;
        std::optional<l2a::Request> request;
        [[nodiscard]] bool steered() const { return asked.contains("budget") && asked["budget"] == "auto"; }
    };

    std::mutex mutex_;  // of the next four
    std::condition_variable wake_;
    std::vector<Job> inbox_;
    l2a_engine_stats stats_{};
    bool closed_ = false;

    l2a::Engine engine_;  // this and the rest belong to the thread
    std::unique_ptr<Steering> steering_;
    std::vector<Job> jobs_;
    std::thread thread_;

    void run() {
        while (take()) {
            for (Job& job : jobs_) attempt(job, [&] { steer(job); });
            try {
                engine_.step();
            } catch (const l2a::Error& error) {
                if (error.code() != L2A_ERROR_OUT_OF_MEMORY) fail_all();  // else the step may be tried again
            } catch (...) {
                fail_all();
            }
            for (Job& job : jobs_) attempt(job, [&] { finish(job); });
            jobs_.erase(std::remove_if(jobs_.begin(), jobs_.end(), [](const Job& job) { return !job.request; }),
                        jobs_.end());
        }
        const auto closed = std::make_exception_ptr(std::runtime_error("the service is closed"));
        for (Job& job : jobs_) job.answer.set_exception(closed);
        for (Job& job : inbox_) job.answer.set_exception(closed);
    }

    // A fault of the library: nobody waits for it for ever.
    void fail_all() {
        const std::exception_ptr fault = std::current_exception();
        for (Job& job : jobs_) {
            if (job.request) attempt(job, [&] { std::rethrow_exception(fault); });
        }
    }

    // Submits what has come, and waits for it where nothing runs. False at the end.
    bool take() {
        std::vector<Job> come;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            stats_ = engine_.statistics();
            if (jobs_.empty()) wake_.wait(lock, [&] { return closed_ || !inbox_.empty(); });
            if (closed_) return false;
            come.swap(inbox_);
        }
        for (Job& job : come) {
            attempt(job, [&] { submit(job); });
            if (job.request) jobs_.push_back(std::move(job));
        }
        return true;
    }

    // What goes wrong with a job is its caller's to know.
    template <typename Action>
    void attempt(Job& job, Action action) {
        try {
            action();
        } catch (...) {
            job.answer.set_exception(std::current_exception());
            if (job.request) job.request->forget();
            job.request.reset();
        }
    }

    void submit(Job& job) {
        const Json& asked = job.asked;
        l2a::RequestOptions options;
        options.max_think_tokens = asked.value("max_think_tokens", options.max_think_tokens);
        options.max_answer_tokens = asked.value("max_answer_tokens", options.max_answer_tokens);
        options.temperature = asked.value("temperature", options.temperature);
        options.seed = asked.value("seed", options.seed);
        const auto prompt = asked.at("prompt").get<std::vector<int64_t>>();
        if (job.steered()) {
            if (!steering_) throw std::invalid_argument("budget auto needs a cost table; give one at the start");
            const l2a_decision now = steering_->decide(engine_.statistics(), static_cast<int64_t>(prompt.size()));
            if (now.admit == 0) throw Refused();
            options.budget = now.budget;
        } else if (asked.contains("budget")) {
            options.budget = l2a::budget(asked["budget"].get<double>());
        }
        job.request = engine_.submit(prompt, options);
    }

    // A cap on reasoning is for requests that have not begun: this one has been told its own. Where the budget cannot be
    // changed the old one stays.
    void steer(const Job& job) {
        if (!job.steered()) return;
        l2a::Budget budget = steering_->decide(engine_.statistics(), 0).budget;
        budget.think_tokens = job.request->info().budget.think_tokens;
        try {
            job.request->set_budget(budget);
        } catch (const l2a::Error& error) {
            std::cerr << error.what() << '\n';
        }
    }

    void finish(Job& job) {
        if (!job.request || !job.request->done()) return;  // a job that failed has been answered
        const l2a_request_info info = job.request->info();
        Json answer = {{"think", job.request->tokens(l2a::Part::think)},
                       {"answer", job.request->tokens(l2a::Part::answer)},
                       {"budget", info.budget.compute},
                       {"cost", info.cost},
                       {"layers", info.layers}};
        job.request->forget();
        job.request.reset();
        job.answer.set_value(std::move(answer));
    }
};

int run(int count, char** arguments) {
    if (count < 3) {
        std::cerr << "usage: l2a_service BUNDLE PORT [COSTS.json]\n";
        return 2;
    }
    const l2a::Runtime runtime(arguments[1]);
    Service service(runtime, count > 3 ? arguments[3] : "");
    httplib::Server server;
    server.Post("/generate", [&](const httplib::Request& request, httplib::Response& response) {
        try {
            response.set_content(service.generate(Json::parse(request.body)).dump(), "application/json");
        } catch (const l2a::Error& error) {
            const bool asked = error.code() == L2A_ERROR_BUDGET || error.code() == L2A_ERROR_CONFIG;
            response.status = asked ? 400 : error.code() == L2A_ERROR_OUT_OF_MEMORY ? 503 : 500;
            response.set_content(Json{{"error", error.what()}}.dump(), "application/json");
        } catch (const Refused& error) {
            response.status = 503;
            response.set_content(Json{{"error", error.what()}}.dump(), "application/json");
        } catch (const std::exception& error) {  // of the JSON
            response.status = 400;
            response.set_content(Json{{"error", error.what()}}.dump(), "application/json");
        }
    });
    server.Get("/health", [&](const httplib::Request&, httplib::Response& response) {
        response.set_content(service.health().dump(), "application/json");
    });
    const int port = std::stoi(arguments[2]);
    const int bound = port == 0 ? server.bind_to_any_port("127.0.0.1") : port;
    if (port != 0 && !server.bind_to_port("127.0.0.1", port)) throw std::runtime_error("the port is taken");
    std::cout << "http://127.0.0.1:" << bound << std::endl;
    return server.listen_after_bind() ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run(count, arguments);
    } catch (const std::exception& error) {
        std::cerr << "l2a_service: " << error.what() << '\n';
        return 1;
    }
}
