// Whatever an ONNX file holds, its tensors and constants are found, or it is one bundle error.
#include <cstdlib>
#include <string>

#include "error.hpp"
#include "onnx_reader.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view model(reinterpret_cast<const char*>(data), size);
    try {
        l2a::core::external_tensors(model);
        l2a::core::constant_part(model);
    } catch (const l2a::core::Error& error) {
        if (error.code() != L2A_ERROR_BUNDLE) std::abort();
    }
    return 0;
}
