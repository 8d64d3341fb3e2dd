// Memory that is left: who is admitted, who is interrupted, and what is given back.
#include <doctest/doctest.h>

#include <chrono>
#include <limits>
#include <thread>

#include "cases.hpp"

namespace {

// What requests take of memory, in bytes, by the If graph.
class Sizes {
  public:
    explicit Sizes(const l2a::Runtime& runtime) : shape_(cases::Json::parse(runtime.manifest())["shape"]) {
        for (size_t place = 0; place < l2a_runtime_cache_count(runtime.get(), 0); ++place) {
            l2a_cache_info cache{};
            l2a::check(l2a_runtime_cache(runtime.get(), 0, place, &cache));
            REQUIRE(cache.type == 1);
            token_ += cache.groups * cache.head_dim * int64_t{sizeof(float)};
        }
    }
    [[nodiscard]] int64_t whole(const cases::Case& one) const { return most(one) * token_; }
    // That a request may still write.
    [[nodiscard]] int64_t rest(const cases::Case& one, const l2a::Request& request) const {
        return (most(one) - static_cast<int64_t>(one.prompt.size() + request.tokens().size()) + 1) * token_;
    }
    // That its prompt is computed in.
    [[nodiscard]] int64_t scratch(const cases::Case& one) const {
        return 8 * static_cast<int64_t>(one.prompt.size()) *
               (4 * shape_["hidden_size"].get<int64_t>() + 3 * shape_["intermediate_size"].get<int64_t>());
    }

  private:
    cases::Json shape_;
    int64_t token_ = 0;  // of one row

    static int64_t most(const cases::Case& one) {
        return static_cast<int64_t>(one.prompt.size()) + one.options.max_think_tokens + one.options.max_answer_tokens +
               3;
    }
};

l2a::EngineOptions rows(int32_t count) {
    l2a::EngineOptions found;
    found.max_rows = count;
    return found;
}

// An engine that is told what memory is left, and how often it asked.
struct Told {
    Told(const l2a::Runtime& runtime, int32_t count) : engine(runtime, rows(count), [this] {
        ++asked;
        return left;
    }) {}
    l2a::Request submit(const cases::Case& one) { return engine.submit(one.prompt, one.options); }
    void leave(int64_t bytes) { left = static_cast<double>(bytes); }
    // Until the engine looks again at what is left for rows that run.
    static void wait() { std::this_thread::sleep_for(std::chrono::milliseconds(250)); }

    double left = std::numeric_limits<double>::infinity();
    int asked = 0;
    l2a::Engine engine;
};

// Whose reasoning runs to its cap.
cases::Case long_one() {
    cases::Case found = cases::of("fp32", false).front();
    found.options.max_think_tokens = 60;
    found.options.budget.think_tokens = -1;
    found.options.tau_threshold = -1;
    return found;
}

cases::Case short_one() {
    cases::Case found = cases::of("fp32", false).front();
    REQUIRE(found.options.budget.think_tokens == -1);
    return found;
}

}  // namespace

TEST_SUITE_BEGIN("engine");

TEST_CASE("a request waits for memory that is not left, and has an error where it does not fit alone") {
    const l2a::Runtime runtime = cases::open("fp32");
    const Sizes sizes(runtime);
    const cases::Case one = short_one();
    const int64_t alone = sizes.whole(one) + sizes.scratch(one);
    for (const bool fits : {false, true}) {
        Told told(runtime, 3);
        const l2a::Request first = told.submit(one);
        told.engine.step();
        const l2a::Request second = told.submit(one);
        told.leave(alone + sizes.whole(one) - (fits ? 0 : 1));  // both anew, as the caches grow
        told.engine.step();
        CHECK(told.engine.statistics().running == (fits ? 2 : 1));
        while (told.engine.step()) continue;
        CHECK(first.tokens() == one.written);
        CHECK(second.tokens() == one.written);
        told.leave(alone - (fits ? 0 : 1));
        const l2a::Request third = told.submit(one);
        while (told.engine.step()) continue;
        CHECK(third.info().error == (fits ? L2A_OK : L2A_ERROR_OUT_OF_MEMORY));
        if (fits) continue;
        const std::string why = l2a_engine_error(told.engine.get(), third.id());
        CHECK(why.find(std::to_string(alone) + " bytes for its keys and values and to compute its prompt, of which " +
                       std::to_string(alone - 1) + " are left") != std::string::npos);
    }
}

TEST_CASE("where others take memory the newest rows wait, and are computed again") {
    const l2a::Runtime runtime = cases::open("fp32");
    const Sizes sizes(runtime);
    const cases::Case one = long_one();
    l2a::Engine plain = cases::engine(runtime, false, 1);
    const l2a::Request expected = plain.submit(one.prompt, one.options);
    while (plain.step()) continue;
    Told told(runtime, 3);
    std::vector<l2a::Request> requests{told.submit(one), told.submit(one)};
    told.engine.step();
    CHECK(told.engine.statistics().cache_bytes == 3 * sizes.whole(one));
    requests.push_back(told.submit(one));  // into what is reserved: what the others may write counts
    told.leave(sizes.rest(one, requests[0]) + sizes.rest(one, requests[1]) + sizes.whole(one) + sizes.scratch(one) - 1);
    told.engine.step();
    CHECK(told.engine.statistics().running == 2);
    told.leave(sizes.rest(one, requests[0]));
    Told::wait();
    told.engine.step();
    CHECK(requests[0].info().running == 1);
    CHECK(told.engine.statistics().waiting == 2);
    told.leave(0);
    Told::wait();
    told.engine.step();
    CHECK(requests[0].info().running == 1);  // a row alone goes on
    told.left = std::numeric_limits<double>::quiet_NaN();  // nobody knows
    while (told.engine.step()) continue;
    for (const l2a::Request& request : requests) CHECK(request.tokens() == expected.tokens());
    CHECK(told.engine.statistics().recomputed_rows == 1);
}

TEST_CASE("a request that was interrupted is not one that waits for its turn") {
    const l2a::Runtime runtime = cases::open("fp32");
    Told told(runtime, 2);
    const std::vector<l2a::Request> requests{told.submit(long_one()), told.submit(long_one())};
    CHECK(told.engine.statistics().oldest_seconds > 0);
    CHECK(told.engine.statistics().held_bytes == 0);
    told.engine.step();
    CHECK(told.engine.statistics().held_bytes > 0);
    CHECK(told.engine.statistics().held_bytes < told.engine.statistics().cache_bytes);
    told.leave(0);
    Told::wait();
    told.engine.step();
    CHECK(told.engine.statistics().waiting == 1);
    CHECK(told.engine.statistics().oldest_seconds == 0);
}

TEST_CASE("caches grow for a raised cap only into memory that is left") {
    const l2a::Runtime runtime = cases::open("fp32");
    cases::Case one = long_one();
    one.options.budget.think_tokens = 20;
    Told told(runtime, 1);
    const l2a::Request request = told.submit(one);
    told.engine.step();
    const int64_t before = told.engine.statistics().cache_bytes;
    l2a_budget more = one.options.budget;
    more.think_tokens = 60;
    request.set_budget(more);
    told.leave(0);
    while (told.engine.step()) CHECK(told.engine.statistics().cache_bytes <= before);
    CHECK(request.info().error == L2A_ERROR_OUT_OF_MEMORY);
    CHECK(request.tokens().size() > 20);  // what there was room for
}

TEST_CASE("memory that a row of before has taken counts as taken") {
    const l2a::Runtime runtime = cases::open("fp32");
    const Sizes sizes(runtime);
    const cases::Case one = long_one();
    Told told(runtime, 2);
    const l2a::Request first = told.submit(one);
    l2a::Request second = told.submit(one);
    for (int step = 0; step < 10; ++step) told.engine.step();
    const int64_t rest = sizes.rest(one, second);
    second.cancel();
    second = told.submit(one);
    told.leave(sizes.rest(one, first) + rest + sizes.scratch(one) - 1);
    const int64_t held = told.engine.statistics().held_bytes;
    told.engine.step();
    CHECK(second.info().running == 0);
    const int64_t kept = told.engine.statistics().held_bytes;
    CHECK(kept < held);  // as memory is short, what nobody needs is given back
    second.forget();
    second = told.submit(one);
    told.leave(sizes.rest(one, first) + sizes.whole(one) + sizes.scratch(one));
    told.engine.step();
    CHECK(second.info().running == 1);
    CHECK(first.info().running == 1);
}

TEST_CASE("memory that is left is looked at when a row comes, and five times a second while several run") {
    const l2a::Runtime runtime = cases::open("fp32");
    const cases::Case one = long_one();
    Told told(runtime, 2);
    (void)told.submit(one);
    while (told.engine.step()) continue;
    CHECK(told.asked == 1);
    const auto began = std::chrono::steady_clock::now();
    (void)told.submit(one);
    (void)told.submit(one);
    while (told.engine.step()) continue;
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - began;
    CHECK(told.asked >= 4);
    CHECK(told.asked <= 4 + passed.count() / 0.2);
}

TEST_CASE("caches grow by one row where more would not fit") {
    const l2a::Runtime runtime = cases::open("fp32");
    const Sizes sizes(runtime);
    const cases::Case one = long_one();
    Told told(runtime, 8);
    for (int row = 0; row < 3; ++row) (void)told.submit(one);
    told.engine.step();
    (void)told.submit(one);
    told.leave(4 * sizes.whole(one) + sizes.scratch(one));
    told.engine.step();
    CHECK(told.engine.statistics().running == 4);
    CHECK(told.engine.statistics().cache_bytes == 4 * sizes.whole(one));
}

TEST_CASE("a function of the memory that is left that throws knows nothing") {
    const l2a::Runtime runtime = cases::open("fp32");
    const cases::Case one = short_one();
    l2a::Engine engine(runtime, {}, []() -> double { throw std::runtime_error("no"); });
    const l2a::Request request = engine.submit(one.prompt, one.options);
    while (engine.step()) continue;
    CHECK(request.tokens() == one.written);
}

TEST_CASE("caches end with the last row, at once where it is cancelled") {
    const l2a::Runtime runtime = cases::open("fp32");
    const cases::Case one = short_one();
    l2a::Engine engine(runtime, rows(2));
    const l2a::Request first = engine.submit(one.prompt, one.options);
    const l2a::Request second = engine.submit(one.prompt, one.options);
    engine.step();
    first.cancel();
    CHECK(engine.statistics().running == 1);
    CHECK(engine.statistics().copied_rows == 1);
    second.cancel();
    CHECK(engine.statistics().cache_bytes == 0);
    const l2a::Request third = engine.submit(one.prompt, one.options);
    while (engine.step()) CHECK(engine.statistics().cache_bytes > 0);
    CHECK(engine.statistics().cache_bytes == 0);
    CHECK(third.tokens() == one.written);
}

TEST_CASE("caches end with the last row, too where it has left to be computed again or could not be computed") {
    {
        const l2a::Runtime runtime = cases::open("fp32");
        l2a::Engine engine = cases::engine(runtime, true, 2);
        const cases::Case one = cases::of("fp32", true).front();
        l2a::RequestOptions options = one.options;
        options.budget = l2a::budget(0.6);
        for (const bool forgotten : {false, true}) {
            const l2a::Request request = engine.submit(one.prompt, options);
            engine.step();
            CHECK(engine.statistics().cache_bytes > 0);
            request.set_budget(l2a::full_budget());
            REQUIRE(request.info().running == 0);
            if (forgotten) request.forget();
            else request.cancel();
            CHECK(engine.statistics().cache_bytes == 0);
        }
    }
    const l2a::Runtime runtime = cases::open("fragile");
    const auto most = cases::all()["fragile"].get<std::size_t>();
    const auto all = cases::of("fp32", false);
    l2a::Engine engine = cases::engine(runtime, false, 2);
    std::vector<int64_t> prompt = all.front().prompt;
    while (prompt.size() <= most) prompt.insert(prompt.begin(), prompt.front());
    const l2a::Request request = engine.submit(prompt, all.front().options);
    while (engine.step()) continue;
    CHECK(request.info().error == L2A_ERROR_SESSION);
    CHECK(engine.statistics().cache_bytes == 0);
}

TEST_CASE("who waits for memory is tried again at once with another budget") {
    const l2a::Runtime runtime = cases::open("fp32");
    Told told(runtime, 2);
    const l2a::Request first = told.submit(long_one());
    told.engine.step();
    const l2a::Request second = told.submit(long_one());
    told.leave(0);
    told.engine.step();
    CHECK(second.info().running == 0);
    told.left = std::numeric_limits<double>::infinity();
    told.engine.step();
    CHECK(second.info().running == 0);  // for a while
    second.set_budget(l2a::full_budget());
    told.engine.step();
    CHECK(second.info().running == 1);
    CHECK(first.info().running == 1);
}

TEST_SUITE_END();
