// An HTTP service of many threads over one engine: an example application.
//
//     l2a_service BUNDLE PORT [COSTS.json]
//
//     POST /generate {"prompt": [ids], "budget": 0.6 | "auto", "max_think_tokens": 64, "temperature": 0.8, "seed": 1}
//       -> {"think": [ids], "answer": [ids], "budget": 0.6, "cost": 0.58, "layers": 7}
//     GET /health -> {"waiting": 0, "running": 1, "cache_bytes": 1048576}
//
//     HTTP threads --job--> inbox --> one thread that owns the engine: submit, step, answer --> HTTP threads
//
// SIGINT and SIGTERM end it once all that came before are answered; a second one ends it at once.
#include <httplib.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
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

// What each request waits in. More wait for theirs, and then for a row of the engine.
constexpr std::size_t kThreads = 64;

// A request that could be served at another time.
class Refused : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Numbers that are not whole, or too large, would be cut to others.
int64_t whole(const Json& value, const std::string& name) {
    if (!value.is_number_integer()) throw std::invalid_argument(name + " must be of whole numbers");
    return value.get<int64_t>();
}

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
            if (closed_) throw Refused("the service is closed");
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
        const auto closed = std::make_exception_ptr(Refused("the service is closed"));
        for (Job& job : jobs_) job.answer.set_exception(closed);
        const std::lock_guard<std::mutex> lock(mutex_);
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
        const l2a_engine_stats stats = engine_.statistics();  // takes a while: nobody waits for it
        {
            std::unique_lock<std::mutex> lock(mutex_);
            stats_ = stats;
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
        const auto limit = [&](const char* name, int64_t known) { return whole(asked.value(name, Json(known)), name); };
        options.max_think_tokens = limit("max_think_tokens", options.max_think_tokens);
        options.max_answer_tokens = limit("max_answer_tokens", options.max_answer_tokens);
        options.temperature = asked.value("temperature", options.temperature);
        const Json seed = asked.value("seed", Json(options.seed));
        if (!seed.is_number_unsigned()) throw std::invalid_argument("seed must be a whole number of at least 0");
        options.seed = seed.get<uint64_t>();
        std::vector<int64_t> prompt;
        for (const Json& id : asked.at("prompt").get_ref<const Json::array_t&>()) prompt.push_back(whole(id, "prompt"));
        if (job.steered()) {
            if (!steering_) throw std::invalid_argument("budget auto needs a cost table; give one at the start");
            const l2a_decision now = steering_->decide(engine_, static_cast<int64_t>(prompt.size()));
            if (now.admit == 0) throw Refused("there is no memory for another request; try again later");
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
        l2a::Budget budget = steering_->decide(engine_, 0).budget;
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

void fail(httplib::Response& response, int status, const char* what) {
    response.status = status;  // what a caller sent may stand in the message, and may not be UTF-8
    const std::string text = Json{{"error", what}}.dump(-1, ' ', false, Json::error_handler_t::replace);
    response.set_content(text, "application/json");
}

void generate(Service& service, const httplib::Request& request, httplib::Response& response) {
    try {
        response.set_content(service.generate(Json::parse(request.body)).dump(), "application/json");
    } catch (const l2a::Error& error) {
        const bool asked = error.code() == L2A_ERROR_BUDGET || error.code() == L2A_ERROR_CONFIG;
        fail(response, asked ? 400 : error.code() == L2A_ERROR_OUT_OF_MEMORY ? 503 : 500, error.what());
    } catch (const Refused& error) {
        fail(response, 503, error.what());
    } catch (const std::bad_alloc& error) {
        fail(response, 503, error.what());
    } catch (const Json::exception& error) {
        fail(response, 400, error.what());
    } catch (const std::invalid_argument& error) {
        fail(response, 400, error.what());
    } catch (const std::exception& error) {
        fail(response, 500, error.what());
    }
}

// Stops the server at a signal, which all threads block: who is served then gets an answer.
void stop_at(const sigset_t& signals, httplib::Server& server, const std::atomic<bool>& ended) {
    const timespec pause{0, 100'000'000};
    bool asked = false;
    while (!ended && !(asked && server.is_running())) asked = sigtimedwait(&signals, nullptr, &pause) > 0 || asked;
    if (asked && !ended) server.stop();
    pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);  // a second one does what it always did
    while (!ended) std::this_thread::sleep_for(std::chrono::milliseconds(100));
}

int run(int count, char** arguments) {
    if (count < 3) {
        std::cerr << "usage: l2a_service BUNDLE PORT [COSTS.json]\n";
        return 2;
    }
    sigset_t signals;
    sigemptyset(&signals);
    for (const int signal : {SIGINT, SIGTERM}) sigaddset(&signals, signal);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // first: threads begin with what the one that makes them has
    const l2a::Runtime runtime(arguments[1]);
    Service service(runtime, count > 3 ? arguments[3] : "");
    httplib::Server server;
    server.new_task_queue = [] { return new httplib::ThreadPool(kThreads); };
    server.Post("/generate", [&](const httplib::Request& request, httplib::Response& response) {
        generate(service, request, response);
    });
    server.Get("/health", [&](const httplib::Request&, httplib::Response& response) {
        response.set_content(service.health().dump(), "application/json");
    });
    const int port = std::stoi(arguments[2]);
    const int bound = port == 0 ? server.bind_to_any_port("127.0.0.1") : port;
    if (port != 0 && !server.bind_to_port("127.0.0.1", port)) throw std::runtime_error("the port is taken");
    std::cout << "http://127.0.0.1:" << bound << std::endl;
    std::atomic<bool> ended{false};
    std::thread stopper([&] { stop_at(signals, server, ended); });
    const bool served = server.listen_after_bind();
    ended = true;
    stopper.join();
    return served ? 0 : 1;
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
