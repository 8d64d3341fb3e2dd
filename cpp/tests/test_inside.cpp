// Parts that the interface does not show one by one.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "caches.hpp"
#include "cost.hpp"
#include "error.hpp"
#include "files.hpp"
#include "json.hpp"
#include "onnx_reader.hpp"
#include "pages.hpp"
#include "runtime.hpp"
#include "sampling.hpp"

namespace core = l2a::core;

namespace {

// Memory of this process that stands on no file.
long anonymous_bytes() {
    std::ifstream file("/proc/self/smaps_rollup");
    for (std::string name; file >> name;) {
        long kilobytes = 0;
        if (name == "Anonymous:" && file >> kilobytes) return kilobytes * 1024;
    }
    return 0;
}

}  // namespace

TEST_SUITE_BEGIN("inside");

TEST_CASE("draws are those of numpy.random.default_rng") {
    // numpy.random.default_rng(seed).random(2)
    core::Pcg64 zero(0);
    CHECK(zero.uniform() == 0.6369616873214543);
    CHECK(zero.uniform() == 0.2697867137638703);
    core::Pcg64 large(12345678901234567890U);
    CHECK(large.uniform() == 0.004224879795573511);
    CHECK(large.uniform() == 0.6523439976170509);
}

TEST_CASE("greedy decoding takes the first of the largest logits, wherever it stands") {
    core::Sampler greedy(core::Sampling{});
    for (const std::size_t size :
         {std::size_t{1}, std::size_t{31}, std::size_t{33}, std::size_t{2048}, std::size_t{2500}}) {
        std::vector<float> logits(size);
        for (std::size_t at = 0; at < size; ++at) logits[at] = -static_cast<float>(at * 37 % 101);
        for (std::size_t place = 0; place < size; place += 1 + size / 40) {
            CAPTURE(size);
            CAPTURE(place);
            const float before = logits[place];
            logits[place] = 1;
            logits.back() = 1;
            CHECK(greedy.token(logits.data(), size) == static_cast<std::int64_t>(place));
            logits[place] = std::nanf("");
            CHECK_THROWS_AS(greedy.token(logits.data(), size), core::Error);
            logits[place] = before;
        }
    }
    std::vector<float> none(2500, -std::numeric_limits<float>::infinity());
    CHECK(greedy.token(none.data(), none.size()) == 0);
}

// Which spends a draw as well, as in Python.
TEST_CASE("where the largest logit is infinite, or becomes so, the most likely token is drawn") {
    const float infinite = std::numeric_limits<float>::infinity();
    const std::vector<float> common{1, 2, 1.5F, 0};
    for (const double top_p : {1.0, 0.5}) {
        core::Sampling settings;
        settings.temperature = 1;
        settings.top_p = top_p;
        for (settings.seed = 0; settings.seed < 20; ++settings.seed) {
            core::Sampler sampler(settings);
            core::Sampler other(settings);
            const std::vector<float> logits{0, infinite, 1, -infinite};
            CHECK(sampler.token(logits.data(), logits.size()) == 1);
            (void)other.token(common.data(), common.size());
            CHECK(sampler.token(common.data(), common.size()) == other.token(common.data(), common.size()));
        }
        const std::vector<float> none(4, -infinite);
        CHECK(core::Sampler(settings).token(none.data(), none.size()) == 0);
        settings.temperature = 1e-308;  // the largest alone is too large for it
        CHECK(core::Sampler(settings).token(common.data(), common.size()) == 1);
        settings.temperature = 1e-310;  // three are
        CHECK(core::Sampler(settings).token(common.data(), common.size()) == 1);
    }
}

TEST_CASE("limits are exact") {
    core::Shape shape{3, 8, 16, 4, 2, 2, 11};
    const auto cost = core::CostModel::of(shape);
    REQUIRE(cost);
    CHECK(cost->dense_units() == 3 * (6 * 8 * 16 + 2 * 2 * (2 * 2 + 2) * 2 * 8));
    CHECK(cost->limit(1.0) == cost->dense_units());
    CHECK(cost->limit(0.1 + 0.2) == cost->limit(0.3));  // meant as 0.3
    CHECK(cost->limit(5e-324) == 0);
    shape.hidden_size = 1LL << 40;
    shape.intermediate_size = 1LL << 40;
    CHECK_FALSE(core::CostModel::of(shape));
    shape = {1000, 1LL << 20, 1LL << 29, 1, 1, 1, 11};  // near 2^62
    const auto big = core::CostModel::of(shape);
    REQUIRE(big);
    CHECK(big->limit(0.5) == big->dense_units() / 2 + big->dense_units() / 1000000000000);
}

TEST_CASE("zeroed pages take memory only where they are written to") {
    constexpr std::size_t page = 4096;
    const core::Pages pages = core::zeroed(256 * page);
    REQUIRE(pages);
    std::byte* data = pages.get();
    data[100 * page] = std::byte{1};
    std::vector<unsigned char> present(256);
    REQUIRE(mincore(data, 256 * page, present.data()) == 0);
    CHECK(std::count_if(present.begin(), present.end(), [](unsigned char one) { return one & 1U; }) == 1);
    CHECK(std::count(data, data + 256 * page, std::byte{0}) == 256 * page - 1);
    CHECK_FALSE(core::zeroed(std::size_t{1} << 62U));
}

TEST_CASE("where the system does not say what memory is given, nothing less is known") {
    core::Pages pages = core::zeroed(core::kPage);
    REQUIRE(pages);
    CHECK(core::resident(pages) == 0);
    munmap(pages.get(), core::kPage);
    CHECK(core::resident(pages) == std::numeric_limits<std::int64_t>::max());
    (void)pages.release();
}

TEST_CASE("graphs of one engine must have caches of one type") {
    const core::Runtime runtime(std::string(L2A_CASES) + "/mixed", {1, core::Contract::cap, L2A_GRAPH_VARIANTS});
    const core::Graph& first = *runtime.graphs().front();
    const core::Graph& last = *runtime.graphs().back();
    CHECK_NOTHROW(core::Caches({&first}));
    CHECK_NOTHROW(core::Caches({&last}));
    CHECK_THROWS_AS(core::Caches({&first, &last}), core::Error);
}

TEST_CASE("caches of more bytes than integers hold are a lack of memory") {
    const core::Runtime runtime(std::string(L2A_CASES) + "/fp32", {1, core::Contract::cap, L2A_GRAPH_IF});
    const core::Graph& graph = *runtime.first(core::Kind::any);
    core::Caches caches({&graph});
    caches.reserve(1, 10, {});
    const std::int64_t many = std::int64_t{1} << 60;  // whose bytes are a multiple of 2^64
    CHECK(caches.bytes_for(8, many) > 1e19);
    CHECK(caches.unwritten({{&graph, many}}) == std::numeric_limits<std::int64_t>::max());
    CHECK_THROWS_AS(caches.reserve(8, many, {}), core::Error);
    CHECK(caches.rows() == 1);
    CHECK(caches.capacity() == 10);
}

TEST_CASE("caches that grow keep the tokens of rows that run, and touch nothing else") {
    const core::Runtime runtime(std::string(L2A_CASES) + "/fp32", {1, core::Contract::cap, L2A_GRAPH_IF});
    const core::Graph& graph = *runtime.first(core::Kind::any);
    const core::CacheInput& input = graph.caches().front();
    const auto token = static_cast<std::size_t>(input.head_dim) * core::element_bytes(input.type);
    core::Caches caches({&graph});
    const core::Ort ort;
    const auto at = [&](std::int64_t row, std::size_t cache) {
        void* found = nullptr;
        ort.check(ort->GetTensorMutableData(caches.view(graph, row, 1)[cache].get(), &found), "a view");
        return static_cast<std::byte*>(found);
    };
    caches.reserve(2, 100, {});
    for (const std::int64_t row : {0, 1}) caches.mark(graph, row, 5);
    std::fill_n(at(0, 0), 5 * token, std::byte{7});  // of which 3 are kept
    std::fill_n(at(1, 0), 5 * token, std::byte{8});  // a row that has left
    caches.reserve(3, 200, {3});
    std::byte* first = at(0, 0);
    for (std::size_t cache = 0; cache < graph.caches().size(); ++cache) first = std::min(first, at(0, cache));
    const auto pages = static_cast<std::size_t>(caches.bytes()) / core::kPage;
    REQUIRE(pages < 512);  // no huge page
    std::vector<unsigned char> present(pages);
    REQUIRE(mincore(first, pages * core::kPage, present.data()) == 0);
    CHECK(std::count_if(present.begin(), present.end(), [](unsigned char one) { return one & 1U; }) == 1);
    CHECK(std::count(at(0, 0), at(0, 0) + 3 * token, std::byte{7}) == static_cast<std::ptrdiff_t>(3 * token));
    CHECK(at(0, 0)[3 * token] == std::byte{0});
    CHECK(*at(1, 0) == std::byte{0});
}

TEST_CASE("what a row may still write is counted by what each graph has written of it") {
    const core::Runtime runtime(std::string(L2A_CASES) + "/fp32", {1, core::Contract::cap, L2A_GRAPH_VARIANTS});
    const core::Graph& dense = *runtime.graphs().front();
    const core::Graph& narrow = *runtime.graphs().back();
    core::Caches caches({&dense, &narrow});
    const auto unwritten = [&](const core::Graph& graph, std::size_t row, std::int64_t tokens) {
        std::vector<core::Caches::Extent> extents(row + 1, {&graph, 0});
        extents[row].tokens = tokens;
        return caches.unwritten(extents);
    };
    const auto reserve = [&](std::int64_t rows, std::int64_t capacity, const std::vector<std::int64_t>& lengths) {
        caches.reserve(rows, capacity, lengths);
        for (std::size_t cache = 0; cache < dense.caches().size(); ++cache) {  // all pages have memory: marks decide
            const core::CacheInput& input = dense.caches()[cache];
            void* data = nullptr;
            const core::Ort ort;
            ort.check(ort->GetTensorMutableData(caches.view(dense, 0, rows)[cache].get(), &data), "a view");
            const std::int64_t values = rows * input.groups * capacity * input.head_dim;
            std::memset(data, 1, static_cast<std::size_t>(values) * core::element_bytes(input.type));
        }
    };
    const std::int64_t all = unwritten(dense, 0, 1);
    const std::int64_t some = unwritten(narrow, 0, 1);
    REQUIRE(some < all);
    reserve(2, 100, {});
    CHECK(caches.bytes() == 2 * 100 * all);
    caches.mark(narrow, 0, 30);
    CHECK(caches.held() == 30 * some);
    CHECK(unwritten(narrow, 0, 50) == 20 * some);
    CHECK(unwritten(dense, 0, 50) == 50 * all - 30 * some);
    CHECK(unwritten(dense, 0, 10) == 10 * (all - some));
    CHECK(unwritten(dense, 1, 50) == 50 * all);
    CHECK(unwritten(dense, 2, 50) == 50 * all);  // a row that there is no room for yet
    caches.copy(0, 1, 20);
    CHECK(unwritten(dense, 1, 50) == 50 * all - 20 * some);  // what the row does not have is not copied
    caches.mark(dense, 1, 10);
    caches.swap(0, 1, 40);  // nor exchanged where neither has it
    CHECK(unwritten(dense, 0, 50) == 40 * all - 20 * some);
    CHECK(unwritten(dense, 1, 50) == 40 * all - 20 * some);
    reserve(3, 100, {25});
    CHECK(unwritten(dense, 0, 50) == 40 * all - 15 * some);
    CHECK(unwritten(dense, 1, 50) == 50 * all);
    caches.clear();
    CHECK(caches.bytes() == 0);
    CHECK(unwritten(dense, 0, 50) == 50 * all);
}

TEST_CASE("what short rows of long buffers hold is counted by the pages that they begin") {
    const core::Runtime runtime(std::string(L2A_CASES) + "/fp32", {1, core::Contract::cap, L2A_GRAPH_IF});
    const core::Graph& graph = *runtime.first(core::Kind::any);
    const bool huge = core::has_huge_pages();
    // Groups within a huge page, and over several; and where the system has no huge pages left.
    for (const auto& [capacity, left] : {std::pair{3000, true}, {100000, true}, {100000, false}}) {
        core::Caches caches({&graph});
        caches.reserve(4, capacity, {});
        CHECK(caches.held() == 0);
        if (!left) REQUIRE(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0);
        const std::int64_t wanted = caches.unwritten({{&graph, 0}, {&graph, 20}});
        const long before = anonymous_bytes();
        for (std::size_t cache = 0; cache < graph.caches().size(); ++cache) {
            const core::CacheInput& input = graph.caches()[cache];
            const auto token = static_cast<std::size_t>(input.head_dim) * core::element_bytes(input.type);
            void* data = nullptr;
            const core::Ort ort;
            ort.check(ort->GetTensorMutableData(caches.view(graph, 1, 1)[cache].get(), &data), "a view");
            for (std::int64_t group = 0; group < input.groups; ++group) {
                auto* first = static_cast<std::byte*>(data) + static_cast<std::size_t>(group * capacity) * token;
                std::fill_n(first, 20 * token, std::byte{7});
            }
        }
        caches.mark(graph, 1, 20);
        REQUIRE(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0);
        const long taken = anonymous_bytes() - before;
        const long small = static_cast<long>(graph.caches().size() * 8 * core::kPage) + 300000;  // and what the test takes
        CAPTURE(capacity);
        if (left || !huge) CHECK(caches.held() == wanted);
        CHECK(taken <= caches.held() + small);
        CHECK(caches.held() <= taken + small);
        CHECK(caches.unwritten({{&graph, 20}, {&graph, 20}}) <= caches.unwritten({{&graph, 20}, {&graph, 40}}));
        // What a longer row may take is not there yet, whatever stands on the pages that it has begun.
        const std::int64_t rest = caches.unwritten({{&graph, 0}, {&graph, capacity}});
        CHECK(rest + caches.held() >= caches.bytes() / 4);
    }
}

TEST_CASE("what rows of before hold is given back, and what rows hold is not") {
    const core::Runtime runtime(std::string(L2A_CASES) + "/fp32", {1, core::Contract::cap, L2A_GRAPH_IF});
    const core::Graph& graph = *runtime.first(core::Kind::any);
    const core::CacheInput& input = graph.caches().front();
    const auto token = static_cast<std::size_t>(input.head_dim) * core::element_bytes(input.type);
    for (const std::int64_t capacity : {100, 3000, 100000}) {
        CAPTURE(capacity);
        core::Caches caches({&graph});
        caches.reserve(4, capacity, {});
        const auto group = [&](std::int64_t row, std::size_t cache, std::int64_t number) {
            void* data = nullptr;
            const core::Ort ort;
            ort.check(ort->GetTensorMutableData(caches.view(graph, row, 1)[cache].get(), &data), "a view");
            return static_cast<std::byte*>(data) + static_cast<std::size_t>(number * capacity) * token;
        };
        const auto filled = static_cast<std::size_t>(capacity) * token;
        for (const std::int64_t row : {0, 1, 3}) {
            caches.mark(graph, row, capacity);
            for (std::size_t cache = 0; cache < graph.caches().size(); ++cache) {
                for (std::int64_t number = 0; number < graph.caches()[cache].groups; ++number) {
                    std::fill_n(group(row, cache, number), filled, std::byte{7});
                }
            }
        }
        const std::int64_t held = caches.held();
        const long before = anonymous_bytes();
        caches.trim({capacity, 20});
        const long given = before - anonymous_bytes();
        CHECK(given > 0);
        CHECK(std::abs(given - (held - caches.held())) < static_cast<long>(graph.caches().size() * 16 * core::kPage));
        for (std::size_t cache = 0; cache < graph.caches().size(); ++cache) {
            for (std::int64_t number = 0; number < graph.caches()[cache].groups; ++number) {
                const auto whole = static_cast<std::ptrdiff_t>(filled);
                CHECK(std::count(group(0, cache, number), group(0, cache, number) + filled, std::byte{7}) == whole);
                CHECK(std::count(group(1, cache, number), group(1, cache, number) + 20 * token, std::byte{7}) ==
                      static_cast<std::ptrdiff_t>(20 * token));
            }
        }
        CHECK(caches.unwritten({{&graph, capacity}, {&graph, 20}}) == 0);
        caches.trim({});
        CHECK(caches.held() == 0);
        CHECK(std::count(group(0, 0, 0), group(0, 0, 0) + filled, std::byte{0}) == static_cast<std::ptrdiff_t>(filled));
    }
}

TEST_CASE("JSON is read strictly") {
    CHECK(core::parse_json(R"({"a": [1, 2.5, "x", null, true]})")["a"].size() == 5);
    for (const char* text : {"", "{", R"({"a": 1, "a": 2})", "NaN", "1e999", "99999999999999999999", "\xEF\xBB\xBF{}",
                             R"("\ud800")", "\"\xFF\"", "[1,]", "{} {}"}) {
        CAPTURE(text);
        CHECK_THROWS_AS(core::parse_json(text), std::invalid_argument);
    }
    CHECK_NOTHROW(core::parse_json(std::string(32, '[') + std::string(32, ']')));
    CHECK_THROWS_AS(core::parse_json(std::string(33, '[') + std::string(33, ']')), std::invalid_argument);
    CHECK_THROWS_AS(core::parse_json(std::string(100000, '[')), std::invalid_argument);
}

TEST_CASE("paths stay inside") {
    for (const char* name : {"a", "a/b", "a.onnx", "..a", "a..b/c"}) CHECK(core::is_inside(name));
    for (const char* name : {"", "/", "/a", "..", "../a", "a/..", "a/../b", ".", "./a", "a//b", "a/", "a\\b", "c:x"}) {
        CAPTURE(name);
        CHECK_FALSE(core::is_inside(name));
    }
}

TEST_CASE("digests") {
    const auto text = std::string("abc");
    CHECK(core::sha256_of(reinterpret_cast<const std::byte*>(text.data()), 3) ==
          "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(core::sha256_of(nullptr, 0) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST_CASE("what is no ONNX graph is refused") {
    const auto read = [](std::string_view bytes) { return core::external_tensors(bytes); };
    CHECK(read("").empty());
    CHECK(read(std::string("\x3a\x00", 2)).empty());  // an empty graph
    CHECK_THROWS_AS(read("\x3a\x05"), core::Error);   // cut off
    CHECK_THROWS_AS(read("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), core::Error);
    CHECK_THROWS_AS(read("\x3b"), core::Error);  // a group, which ONNX has not
}

TEST_SUITE_END();
