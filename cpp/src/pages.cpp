#include "pages.hpp"

#include <sys/mman.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace l2a::core {
namespace {

constexpr std::ptrdiff_t kMostly = 448;      // pages of 512: what is emptier would take more memory than it did
// mallopt(3): once a block is freed, blocks up to its size come from the heap. No larger one counts.
constexpr std::size_t kLargest = (32U << 20U) - (64U << 10U);
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not name

// Collapses each whole huge page of a span that is in use already.
void collapse([[maybe_unused]] std::uintptr_t start, [[maybe_unused]] std::uintptr_t end) {
#ifdef __linux__
    std::array<unsigned char, kHugePage / kPage> present{};
    for (std::uintptr_t place = (start + kHugePage - 1) / kHugePage * kHugePage; place + kHugePage <= end; place += kHugePage) {
        auto* memory = reinterpret_cast<void*>(place);
        if (mincore(memory, kHugePage, present.data()) != 0) continue;
        const auto used = std::count_if(present.begin(), present.end(), [](unsigned char page) { return page & 1U; });
        if (used >= kMostly) madvise(memory, kHugePage, kCollapse);
    }
#endif
}

}  // namespace

bool has_huge_pages() {
#ifdef __linux__
    std::string setting;
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
    return std::getline(file, setting) && setting.find("[never]") == std::string::npos &&
           sysconf(_SC_PAGESIZE) == static_cast<long>(kPage) && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0;
#else
    return false;
#endif
}

HugePages::HugePages() : wanted_(has_huge_pages()) {
    void* volatile block = std::malloc(kLargest);  // volatile: or a compiler leaves both calls out
    std::free(block);
    if (wanted_) before_ = spans();
}

void Unmap::operator()(std::byte* data) const noexcept {
    munmap(data, bytes);
}

Pages zeroed(std::size_t bytes) noexcept {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(found, bytes, MADV_HUGEPAGE);
#endif
    return {static_cast<std::byte*>(found), Unmap{bytes}};
}

bool give_back([[maybe_unused]] std::uintptr_t start, [[maybe_unused]] std::uintptr_t end) noexcept {
#ifdef __linux__
    static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));  // madvise gives a page back that is begun
    start = (start + page - 1) / page * page;
    end = end / page * page;
    return start >= end || madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED) == 0;
#else
    return false;
#endif
}

std::int64_t resident(const Pages& pages) noexcept {
    std::array<unsigned char, 4096> present{};
    const std::size_t bytes = pages ? pages.get_deleter().bytes : 0;
    std::int64_t found = 0;
    for (std::size_t done = 0; done < bytes; done += present.size() * kPage) {
        const std::size_t part = std::min(bytes - done, present.size() * kPage);
        if (mincore(pages.get() + done, part, present.data()) != 0) {
            return std::numeric_limits<std::int64_t>::max();
        }
        const auto end = present.begin() + static_cast<std::ptrdiff_t>((part + kPage - 1) / kPage);
        found += std::count_if(present.begin(), end, [](unsigned char page) { return page & 1U; });
    }
    return found * static_cast<std::int64_t>(kPage);
}

void give_back() noexcept {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

void HugePages::ask() const noexcept try {
    give_back();  // making sessions leaves much
    if (!wanted_) return;
    for (auto [start, end] : spans()) {
        for (const auto& [low, high] : before_) {
            if (high <= start || low >= end) continue;
            if (low > start) collapse(start, low);
            start = high;
        }
        if (start < end) collapse(start, end);
    }
} catch (...) {  // slower, and no reason to fail
}

// Private memory without a file, ascending.
std::vector<HugePages::Span> HugePages::spans() {
    std::vector<Span> found;
    std::ifstream file("/proc/self/maps");
    for (std::string line; std::getline(file, line);) {
        unsigned long start = 0, end = 0;
        std::array<char, 5> rights{};
        std::array<char, 8> name{};
        const int fields =
            std::sscanf(line.c_str(), "%lx-%lx %4s %*s %*s %*s %7s", &start, &end, rights.data(), name.data());
        const bool anonymous = fields == 3 || (fields == 4 && std::strcmp(name.data(), "[heap]") == 0);
        if (anonymous && std::strcmp(rights.data(), "rw-p") == 0) found.emplace_back(start, end);
    }
    return found;
}

}  // namespace l2a::core
