// Many engines over one runtime at the same time give bit for bit what one after another gives.
#include <doctest/doctest.h>

#include <atomic>
#include <thread>

#include "cases.hpp"

TEST_SUITE_BEGIN("threads");

TEST_CASE("8 threads over one runtime, budgets switching, are equal to one") {
    const l2a::Runtime runtime = cases::open("fp32");
    std::atomic<std::size_t> found{0};
    std::atomic<std::size_t> asked{0};
    std::vector<std::thread> threads;
    for (int number = 0; number < 8; ++number) {
        threads.emplace_back([&, number] {
            const bool variants = number % 2 == 1;
            const auto all = cases::of("fp32", variants);
            std::vector<cases::Case> mine;
            for (std::size_t at = 0; mine.size() < L2A_REQUESTS; ++at) {
                mine.push_back(all[(at * 7 + static_cast<std::size_t>(number) * 31) % all.size()]);
            }
            l2a::Engine engine = cases::engine(runtime, variants, 1 + number);
            found += cases::equal(engine, mine, 1 + static_cast<std::size_t>(number));
            asked += mine.size();
        });
    }
    for (std::thread& thread : threads) thread.join();
    MESSAGE(found.load(), " of ", asked.load(), " requests of 8 threads equal");
    CHECK(found == asked);
}

TEST_CASE("runtimes are opened and closed by many threads at once") {
    std::atomic<int> opened{0};
    std::vector<std::thread> threads;
    for (int number = 0; number < 4; ++number) {
        threads.emplace_back([&] {
            const l2a::Runtime runtime = cases::open("int8");
            opened += runtime.graphs().size() > 5 ? 1 : 0;
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(opened == 4);
}

TEST_SUITE_END();
