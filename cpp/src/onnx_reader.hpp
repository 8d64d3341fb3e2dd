// The weights that an ONNX graph takes from the weight file, read from the few protobuf fields that say so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace l2a::core {

// A tensor that stands in another file. Names are unique in a bundle: equal names are equal bytes.
struct ExternalTensor {
    std::string name;
    std::string location;
    int type = 0;  // as TensorProto.DataType, which is also ONNX Runtime's
    std::vector<std::int64_t> dims;
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
};

// All of a serialized ModelProto, those of branches among them. Throws Error (bundle) where it is not one.
std::vector<ExternalTensor> external_tensors(const std::byte* data, std::size_t size);

}  // namespace l2a::core
