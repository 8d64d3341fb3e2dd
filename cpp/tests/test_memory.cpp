// An allocation that fails in the middle of a step loses no request and no token.
#include <doctest/doctest.h>

#include <cstdlib>
#include <new>

#include "cases.hpp"

namespace {

thread_local std::size_t short_of = 0;  // bytes; 0: of nothing
thread_local int left = 0;              // allocations of so many bytes before the one that fails

}  // namespace

// All of the program's; a size of no other use tells those that are meant.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
    if (short_of > 0 && bytes == short_of && left-- == 0) throw std::bad_alloc();
    void* found = std::malloc(bytes == 0 ? 1 : bytes);
    if (found == nullptr) throw std::bad_alloc();
    return found;
}
[[gnu::noinline]] void operator delete(void* data) noexcept {
    std::free(data);
}
[[gnu::noinline]] void operator delete(void* data, std::size_t) noexcept {
    std::free(data);
}

TEST_SUITE_BEGIN("engine");

TEST_CASE("a draw without memory, of the first token or a later one, is made again and writes the same text") {
    const l2a::Runtime runtime = cases::open("fp32");
    std::vector<cases::Case> all;
    for (cases::Case& one : cases::of("fp32", false)) {
        if (one.options.temperature > 0 && one.written.size() > 8) all.push_back(std::move(one));
    }
    REQUIRE(all.size() > 24);
    std::int64_t recomputed = 0;
    for (int fails = 0; fails < 11; ++fails) {
        CAPTURE(fails);
        l2a::Engine engine = cases::engine(runtime, false, 4);
        const cases::Case& before = all[static_cast<std::size_t>(2 * fails)];
        const cases::Case& behind = all[static_cast<std::size_t>(2 * fails + 1)];
        const l2a::Request first = engine.submit(before.prompt, before.options);
        engine.step();
        const l2a::Request second = engine.submit(behind.prompt, behind.options);
        left = fails;
        short_of = static_cast<std::size_t>(runtime.model().vocab_size) * sizeof(double);
        engine.step();
        engine.step();
        short_of = 0;
        CHECK(left < 0);
        CHECK(engine.statistics().running + engine.statistics().waiting == 2);
        while (engine.step()) continue;
        CHECK(first.tokens() == before.written);
        CHECK(second.tokens() == behind.written);
        recomputed += engine.statistics().recomputed_rows;
    }
    CHECK(recomputed > 0);
}

TEST_SUITE_END();
