// What memory of the process stands on, and when it goes back to the system.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace l2a::core {

constexpr std::size_t kPage = 4096;
constexpr std::uintptr_t kHugePage = 2U << 20U;  // elsewhere the kernel refuses

// Whether the system has huge pages and gives them to this process where it asks. It may have none left all the same.
bool has_huge_pages();

// Ends a mapping.
struct Unmap {
    std::size_t bytes = 0;
    void operator()(std::byte* data) const noexcept;
};
// Zeroed memory, on huge pages where there are any, that goes back to the system as it ends, and whose pages take none
// until they are written to. What the C library gives is neither, where it stands in the heap.
using Pages = std::unique_ptr<std::byte, Unmap>;
// None where there is no room.
Pages zeroed(std::size_t bytes) noexcept;

// Gives the whole pages between two places of zeroed() back; they read as zeros, and take memory when they are written.
// False where the system does not take them.
bool give_back(std::uintptr_t start, std::uintptr_t end) noexcept;

// Bytes of zeroed() that have been given memory; INT64_MAX where the system does not say.
std::int64_t resident(const Pages& pages) noexcept;

// Has the C library return to the system what it holds and nobody uses.
void give_back() noexcept;

// Remembers what private memory the process has, and asks for huge pages for what it has got since. ONNX Runtime packs
// each matrix into an allocation of its own, most of them smaller than a huge page, and the C library maps such one by
// one, wherever there is room. So they are made to stand in the heap, one behind another, and Linux 6.1 and later put
// them on huge pages when asked. Where there are none, or they are not wanted, nothing else changes.
class HugePages {
  public:
    HugePages();
    void ask() const noexcept;  // and gives back what was freed

  private:
    using Span = std::pair<std::uintptr_t, std::uintptr_t>;  // start and end
    static std::vector<Span> spans();
    std::vector<Span> before_;
    bool wanted_;
};

}  // namespace l2a::core
