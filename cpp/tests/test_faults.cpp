// Caches that may not grow, and graphs that fail: what becomes of the request, and that the others go on.
#include <doctest/doctest.h>

#include <algorithm>

#include "cases.hpp"

TEST_SUITE_BEGIN("engine");

TEST_CASE("caches that may not grow make requests wait, and one that never fits has its own error") {
    const l2a::Runtime runtime = cases::open("fp32");
    const auto all = cases::of("fp32", false);
    l2a::Engine probe = cases::engine(runtime, false, 1);
    (void)probe.submit(all.front().prompt, all.front().options);
    probe.step();
    l2a::EngineOptions options;
    options.max_cache_bytes = probe.statistics().cache_bytes + 1;
    l2a::Engine engine(runtime, options);
    std::vector<l2a::Request> requests;
    for (int at = 0; at < 3; ++at) requests.push_back(engine.submit(all.front().prompt, all.front().options));
    l2a::RequestOptions large = all.front().options;
    large.max_think_tokens = 300;
    const l2a::Request never = engine.submit(all.front().prompt, large);
    engine.step();
    CHECK(engine.statistics().running == 1);
    while (engine.step()) continue;
    for (const l2a::Request& request : requests) CHECK(request.tokens() == all.front().written);
    CHECK(never.info().error == L2A_ERROR_OUT_OF_MEMORY);
    CHECK_THROWS_AS((void)never.done(), l2a::Error);
}

TEST_CASE("a request needs its own room and not that of others before it") {
    const l2a::Runtime runtime = cases::open("fp32");
    const auto all = cases::of("fp32", false);
    l2a::RequestOptions options = all.front().options;
    const auto bytes = [&](int64_t think) {
        l2a::Engine probe = cases::engine(runtime, false, 1);
        options.max_think_tokens = think;
        (void)probe.submit(all.front().prompt, options);
        probe.step();
        return probe.statistics().cache_bytes;
    };
    l2a::EngineOptions most;
    most.max_rows = 1;
    most.max_cache_bytes = bytes(80);
    l2a::Engine engine(runtime, most);
    for (const int64_t think : {70, 80}) {  // the second is less than half as long again
        options.max_think_tokens = think;
        const l2a::Request request = engine.submit(all.front().prompt, options);
        while (engine.step()) continue;
        CHECK(request.info().error == L2A_OK);
        CHECK(engine.statistics().cache_bytes <= most.max_cache_bytes);
        request.forget();
    }
    options.max_think_tokens = 200;
    options.budget.think_tokens = 10;
    const l2a::Request request = engine.submit(all.front().prompt, options);
    engine.step();
    l2a::Budget longer = options.budget;
    longer.think_tokens = -1;
    request.set_budget(longer);
    while (engine.step()) CHECK(engine.statistics().cache_bytes <= most.max_cache_bytes);
}

TEST_CASE("a request whose cap is raised beyond what the caches may take runs on once the others are done") {
    const l2a::Runtime runtime = cases::open("fp32");
    const auto all = cases::of("fp32", false);
    const auto asked = std::find_if(all.begin(), all.end(), [](const cases::Case& one) {
        return one.stopped_by == L2A_STOPPED_BY_CAP && one.think == 24 && one.changes.empty();
    });
    REQUIRE(asked != all.end());
    l2a::RequestOptions options = asked->options;
    options.tau_threshold = -1;
    options.max_think_tokens = 200;
    const int64_t cap = 96;  // of what gates are told nothing more is shown beyond this: the allocation stays
    const auto alone = [&](int64_t most) {
        options.budget.think_tokens = most;
        l2a::Engine engine = cases::engine(runtime, false, 1);
        const l2a::Request request = engine.submit(asked->prompt, options);
        engine.step();
        const int64_t bytes = engine.statistics().cache_bytes;
        while (engine.step()) continue;
        return std::make_pair(request.tokens(), bytes);
    };
    const auto [whole, least] = alone(-1);
    const auto [capped, less] = alone(cap);
    REQUIRE(whole.size() > capped.size() + 30);
    l2a::EngineOptions most;
    most.max_rows = 4;
    most.max_cache_bytes = 4 * less;
    REQUIRE(least <= most.max_cache_bytes);
    l2a::Engine engine(runtime, most);
    std::vector<l2a::Request> requests{engine.submit(asked->prompt, options)};
    for (int step = 0; step < 20; ++step) engine.step();
    while (requests.size() < 4) requests.push_back(engine.submit(asked->prompt, options));
    engine.step();
    CHECK(engine.statistics().running == 4);
    options.budget.think_tokens = -1;
    requests.front().set_budget(options.budget);
    while (engine.step()) CHECK(engine.statistics().cache_bytes <= most.max_cache_bytes);
    CHECK(requests.front().info().error == L2A_OK);
    CHECK(requests.front().tokens() == whole);
    for (std::size_t at = 1; at < 4; ++at) CHECK(requests[at].tokens() == capped);
    CHECK(engine.statistics().recomputed_rows == 1);
}

// The graphs of the bundle "fragile" cannot read longer texts; those of narrow variants run one row at a time.
void check_fragile(bool variants) {
    const l2a::Runtime runtime = cases::open("fragile");
    const auto most = cases::all()["fragile"].get<std::size_t>();
    const auto all = cases::of("fp32", variants);
    const auto fits = [&](const cases::Case& one) { return one.prompt.size() + one.written.size() <= most + 1; };
    for (const int32_t rows : {1, 4}) {
        l2a::Engine engine = cases::engine(runtime, variants, rows);
        std::size_t whole = 0;
        std::size_t ended = 0;
        for (std::size_t start = 0; start + 4 <= all.size(); start += 4) {
            std::vector<l2a::Request> requests;
            for (std::size_t at = start; at < start + 4; ++at) {
                requests.push_back(engine.submit(all[at].prompt, all[at].options));
            }
            while (engine.step()) continue;
            for (std::size_t at = 0; at < 4; ++at) {
                const cases::Case& asked = all[start + at];
                const auto written = requests[at].tokens();
                const int32_t error = requests[at].info().error;
                if (!asked.changes.empty()) continue;
                CHECK(written.size() <= asked.written.size());
                CHECK(std::equal(written.begin(), written.end(), asked.written.begin()));
                CHECK(error == (written == asked.written ? L2A_OK : L2A_ERROR_SESSION));
                CHECK((error == L2A_OK) == fits(asked));
                (error == L2A_OK ? whole : ended) += 1;
            }
            for (const l2a::Request& request : requests) request.forget();
            CHECK(engine.statistics().running == 0);
        }
        CHECK(whole > all.size() / 20);
        CHECK(ended > all.size() / 20);
    }
}

TEST_CASE("a graph that fails ends the requests that it fails for, and no other of their batch") {
    check_fragile(false);
}

TEST_CASE("variants that fail end the requests that they fail for, and no other") {
    check_fragile(true);
}

// Of one batch by the If graph; by turns on a narrow variant.
void check_fails_alone(bool variants) {
    const l2a::Runtime runtime = cases::open("fragile");
    const auto most = cases::all()["fragile"].get<std::size_t>();
    const auto all = cases::of("fp32", variants);
    const auto asked = [&](bool fits) {
        const auto found = std::find_if(all.begin(), all.end(), [&](const cases::Case& one) {
            return one.options.budget.compute == 0.5 && one.changes.empty() &&
                   (one.prompt.size() + one.written.size() <= most + 1) == fits;
        });
        REQUIRE(found != all.end());
        return *found;
    };
    const cases::Case small = asked(true);
    const cases::Case large = asked(false);
    l2a::Engine engine = cases::engine(runtime, variants, 2);
    const l2a::Request fails = engine.submit(large.prompt, large.options);
    std::vector<l2a::Request> others;
    for (std::size_t step = 0; step < large.written.size() + 5 && fails.info().done == 0; ++step) {
        const bool alone = others.empty() || others.back().info().done != 0;
        if (alone) others.push_back(engine.submit(small.prompt, small.options));
        engine.step();
    }
    CHECK(fails.info().error == L2A_ERROR_SESSION);
    while (engine.step()) continue;
    for (const l2a::Request& one : others) {
        CHECK(one.info().error == L2A_OK);
        CHECK(one.tokens() == small.written);
    }
}

TEST_CASE("a row that fails ends, and the others of its batch go on") {
    check_fails_alone(false);
}

TEST_CASE("a row that fails on a narrow variant ends while others on it go on") {
    check_fails_alone(true);
}

TEST_SUITE_END();
