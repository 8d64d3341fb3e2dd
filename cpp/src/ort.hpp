// The little of ONNX Runtime's C interface that is used, with owners for what it gives out.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>
#include <vector>

#include "error.hpp"

namespace l2a::core {

// Functions of the library that was loaded, of the version that the headers know: a newer library has them too.
class Ort {
  public:
    Ort();
    const OrtApi* operator->() const noexcept { return api_; }
    // Turns a status into an Error that says what was done, and whether memory was short.
    void check(OrtStatus* status, const std::string& what) const;

  private:
    const OrtApi* api_;
};

// Releases with a member of OrtApi.
template <typename T>
class Owner {
  public:
    using Release = void(ORT_API_CALL*)(T*);

    Owner() = default;
    Owner(T* value, Release release) noexcept : value_(value, release) {}
    [[nodiscard]] T* get() const noexcept { return value_.get(); }

  private:
    std::unique_ptr<T, Release> value_{nullptr, nullptr};
};

using OrtValues = std::vector<Owner<OrtValue>>;

// Names what sessions compute in: the processor's arena.
Owner<OrtMemoryInfo> arena_memory(const Ort& ort);

// A tensor over memory of the caller, which outlives it.
Owner<OrtValue> tensor(const Ort& ort, const OrtMemoryInfo* memory, void* data, std::size_t bytes,
                       const std::vector<std::int64_t>& dims, ONNXTensorElementDataType type);

// Bytes of an element; 0 for types that are not used.
std::size_t element_bytes(int type) noexcept;

}  // namespace l2a::core
