// Huge pages for the weights that ONNX Runtime packs as it opens sessions.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace l2a::core {

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
