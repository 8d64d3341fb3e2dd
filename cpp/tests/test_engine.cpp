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
    CHECK((longer.options.memory_left == nullptr));
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
    struct {
        l2a_request_info info;
        unsigned char beyond[8];
    } newer;
    std::memset(&newer, 7, sizeof newer);
    newer.info.struct_size = sizeof newer;
    CHECK(l2a_engine_info(engine.get(), request.id(), &newer.info) == nullptr);
    CHECK(newer.info.struct_size == sizeof newer);
    CHECK(newer.info.done == 1);
    for (const unsigned char byte : newer.beyond) CHECK(byte == 0);
    old.struct_size = 0;
    l2a_status* status = l2a_engine_info(engine.get(), request.id(), &old);
    CHECK(l2a_status_code(status) == L2A_ERROR_CONFIG);
    l2a_status_free(status);
}

TEST_SUITE_END();
