#include "ort.hpp"

#include <algorithm>
#include <cctype>
#include <iterator>

namespace l2a::core {
namespace {

// What ONNX Runtime says where memory is short; messages name tensors and files too, such as `allocation`.
constexpr const char* kShort[] = {"bad_alloc",          "bad allocation", "failed to allocate",
                                  "unable to allocate", "out of memory",  "cannot allocate memory"};

}  // namespace

Ort::Ort() : api_(OrtGetApiBase()->GetApi(ORT_API_VERSION)) {
    if (api_ == nullptr) {
        throw Error(L2A_ERROR_SESSION, std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                                           " is older than the headers l2a was built with; install a newer one");
    }
}

void Ort::check(OrtStatus* status, const std::string& what) const {
    if (status == nullptr) return;
    const Owner<OrtStatus> owner(status, api_->ReleaseStatus);
    const std::string text = api_->GetErrorMessage(status);
    std::string lower = text;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
    const auto said = [&](const char* words) { return lower.find(words) != std::string::npos; };
    if (std::any_of(std::begin(kShort), std::end(kShort), said)) {
        throw Error(L2A_ERROR_OUT_OF_MEMORY,
                    what + ": not enough memory (" + text + "); free some, or lower the budget");
    }
    throw Error(L2A_ERROR_SESSION, what + ": " + text);
}

Owner<OrtMemoryInfo> arena_memory(const Ort& ort) {
    OrtMemoryInfo* found = nullptr;
    ort.check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &found), "memory");
    return {found, ort->ReleaseMemoryInfo};
}

Owner<OrtValue> tensor(const Ort& ort, const OrtMemoryInfo* memory, void* data, std::size_t bytes,
                       const std::vector<std::int64_t>& dims, ONNXTensorElementDataType type) {
    OrtValue* found = nullptr;
    ort.check(ort->CreateTensorWithDataAsOrtValue(memory, data, bytes, dims.data(), dims.size(), type, &found),
              "a tensor");
    return {found, ort->ReleaseValue};
}

std::size_t element_bytes(int type) noexcept {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
            return 1;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
            return 2;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
            return 4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
            return 8;
        default:
            return 0;
    }
}

}  // namespace l2a::core
