// Tokens, allocations and why reasoning stopped are those of the Python runtime, alone and in company.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <random>

#include "cases.hpp"

TEST_SUITE_BEGIN("engine");

TEST_CASE("every request is what Python writes") {
    for (const std::string bundle : {"fp32", "int8", "blind"}) {
        const l2a::Runtime runtime = cases::open(bundle);
        for (const bool variants : {false, true}) {
            auto all = cases::of(bundle, variants);
            REQUIRE(all.size() >= 6 * 8);
            for (const int32_t rows : {1, 8}) {
                l2a::Engine engine = cases::engine(runtime, variants, rows);
                const std::size_t found = cases::equal(engine, all, rows == 1 ? 1 : 12);
                MESSAGE(bundle, variants ? " variants, " : " If graph, ", rows, " rows: ", found, " of ", all.size(),
                        " equal; rows copied ", engine.statistics().copied_rows, ", computed again ",
                        engine.statistics().recomputed_rows);
                CHECK(found == all.size());
                CHECK(engine.statistics().waiting == 0);
                std::shuffle(all.begin(), all.end(), std::mt19937(7));
            }
        }
    }
}

TEST_CASE("a variant is left for a smaller one without copying") {
    const l2a::Runtime runtime = cases::open("fp32");
    l2a::Engine engine = cases::engine(runtime, true, 1);
    const auto all = cases::of("fp32", true);
    l2a::RequestOptions options = all.front().options;
    options.max_think_tokens = 40;
    options.budget = l2a::full_budget();
    const l2a::Request request = engine.submit(all.front().prompt, options);
    for (const double compute : {0.9, 0.7, 0.55}) {
        engine.step();
        request.set_budget(l2a::budget(compute));
    }
    engine.step();
    CHECK(engine.statistics().copied_rows == 0);
    CHECK(engine.statistics().recomputed_rows == 0);
    request.set_budget(l2a::full_budget());
    engine.step();
    CHECK(engine.statistics().recomputed_rows == 1);  // its keys and values were never computed
}

TEST_CASE("what cannot run is refused at once, with the class of error that Python has") {
    const l2a::Runtime runtime = cases::open("fp32");
    l2a::Engine engine = cases::engine(runtime, false, 2);
    const int64_t think = runtime.model().think;
    const auto code = [&](const std::vector<int64_t>& prompt, const l2a::RequestOptions& options) {
        try {
            (void)engine.submit(prompt, options);
        } catch (const l2a::Error& error) {
            return error.code();
        }
        return L2A_OK;
    };
    const l2a::RequestOptions good;
    CHECK(code({5, 1000000, think}, good) == L2A_ERROR_CONFIG);
    CHECK(code({5, -1, think}, good) == L2A_ERROR_CONFIG);
    CHECK(code({5, 6}, good) == L2A_ERROR_CONFIG);
    CHECK(code({}, good) == L2A_ERROR_CONFIG);
    CHECK(code(std::vector<int64_t>(4000, think), good) == L2A_ERROR_CONFIG);
    l2a::RequestOptions bad;
    for (const double compute : {0.01, 0.0, 1.5, std::nan("")}) {
        bad.budget = l2a::budget(compute);
        CHECK(code({5, think}, bad) == L2A_ERROR_BUDGET);
    }
    bad = good;
    bad.budget.layers = 0;
    CHECK(code({5, think}, bad) == L2A_ERROR_BUDGET);
    bad = good;
    bad.max_answer_tokens = 0;
    CHECK(code({5, think}, bad) == L2A_ERROR_CONFIG);
    bad = good;
    bad.temperature = -1;
    CHECK(code({5, think}, bad) == L2A_ERROR_CONFIG);
    bad = good;
    bad.top_p = 0;
    CHECK(code({5, think}, bad) == L2A_ERROR_CONFIG);
    bad = good;
    bad.max_think_tokens = bad.max_answer_tokens = INT64_MAX;  // whose sum is small again
    CHECK(code({5, think}, bad) == L2A_ERROR_CONFIG);
    l2a::EngineOptions less;
    less.max_cache_bytes = -1;
    CHECK_THROWS_AS(l2a::Engine(runtime, less), l2a::Error);
    CHECK_FALSE(engine.step());
    CHECK(code({5, think}, good) == L2A_OK);
}

TEST_CASE("a budget that cannot be leaves the old one") {
    const l2a::Runtime runtime = cases::open("fp32");
    l2a::Engine engine = cases::engine(runtime, true, 2);
    const auto all = cases::of("fp32", true);
    const l2a::Request request = engine.submit(all.front().prompt, all.front().options);
    engine.step();
    const l2a_request_info before = request.info();
    CHECK_THROWS_AS(request.set_budget(l2a::budget(0.05)), l2a::Error);
    l2a::Budget caps = l2a::full_budget();
    caps.layers = 1;
    CHECK_THROWS_AS(request.set_budget(caps), l2a::Error);
    CHECK(request.info().budget.compute == before.budget.compute);
    CHECK(request.info().layers == before.layers);
    while (engine.step()) continue;
    CHECK(request.tokens() == all.front().written);
}

TEST_CASE("a request that is cancelled or forgotten makes room") {
    const l2a::Runtime runtime = cases::open("fp32");
    l2a::Engine engine = cases::engine(runtime, false, 2);
    const auto all = cases::of("fp32", false);
    std::vector<l2a::Request> requests;
    for (std::size_t at = 0; at < 4; ++at) requests.push_back(engine.submit(all[at * 7].prompt, all[at * 7].options));
    engine.step();
    requests[0].cancel();
    requests[1].forget();
    requests[3].cancel();
    CHECK_THROWS_AS((void)requests[1].info(), l2a::Error);
    CHECK(requests[1].tokens().empty());
    while (engine.step()) continue;
    CHECK(requests[0].tokens().size() < all[0].written.size());
    CHECK(requests[3].tokens().empty());
    CHECK(requests[2].tokens() == all[14].written);
}

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

TEST_CASE("a graph that fails ends the requests that it was run for, and nothing else") {
    const l2a::Runtime runtime = cases::open("fragile");  // its graph cannot read longer texts
    const auto most = cases::all()["fragile"].get<std::size_t>();
    const auto all = cases::of("fp32", false);
    const auto fits = [&](const cases::Case& one) { return one.prompt.size() + one.written.size() <= most + 1; };
    for (const int32_t rows : {1, 4}) {
        l2a::Engine engine = cases::engine(runtime, false, rows);
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
                if (!fits(asked)) CHECK(error == L2A_ERROR_SESSION);
                if (rows == 1) CHECK((error == L2A_OK) == fits(asked));
                (error == L2A_OK ? whole : ended) += 1;
            }
            for (const l2a::Request& request : requests) request.forget();
            CHECK(engine.statistics().running == 0);
        }
        CHECK(whole > all.size() / 20);
        CHECK(ended > all.size() / 20);
    }
}

TEST_CASE("options may be older or newer than the library") {
    struct {
        l2a_engine_options options;
        unsigned char beyond[8];
    } longer;
    std::memset(&longer, 7, sizeof longer);
    const std::size_t old = offsetof(l2a_engine_options, max_cache_bytes);
    l2a_engine_options_init(&longer.options, old);
    CHECK(longer.options.struct_size == old);
    CHECK(longer.options.max_rows == 8);
    CHECK(reinterpret_cast<unsigned char*>(&longer.options.max_cache_bytes)[0] == 7);
    l2a_engine_options_init(&longer.options, sizeof longer);
    CHECK(longer.options.struct_size == sizeof longer);
    CHECK(longer.options.max_cache_bytes == 0);
    CHECK(longer.beyond[0] == 0);
    longer.options.max_rows = 2;
    const l2a::Runtime runtime = cases::open("int8");
    l2a_engine* made = nullptr;
    CHECK(l2a_engine_create(runtime.get(), &longer.options, &made) == nullptr);
    l2a_engine_free(made);
}

TEST_CASE("an engine keeps its runtime open, and structures may be older") {
    const auto all = cases::of("int8", false);
    auto runtime = std::make_unique<l2a::Runtime>(cases::open("int8"));
    l2a::Engine engine = cases::engine(*runtime, false, 1);
    runtime.reset();
    const l2a::Request request = engine.submit(all.front().prompt, all.front().options);
    while (engine.step()) continue;
    CHECK(request.tokens() == all.front().written);
    l2a_request_info old{};
    old.struct_size = offsetof(l2a_request_info, layers);
    old.layers = -7;
    CHECK(l2a_engine_info(engine.get(), request.id(), &old) == nullptr);
    CHECK(old.done == 1);
    CHECK(old.layers == -7);
    old.struct_size = 0;
    l2a_status* status = l2a_engine_info(engine.get(), request.id(), &old);
    CHECK(l2a_status_code(status) == L2A_ERROR_CONFIG);
    l2a_status_free(status);
}

TEST_SUITE_END();
