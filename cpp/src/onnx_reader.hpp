// What an ONNX graph takes from the weight file, and what it computes from constants alone, read from the few fields of
// the file that say so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
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

    friend bool operator==(const ExternalTensor& one, const ExternalTensor& other) {
        return one.name == other.name && one.location == other.location && one.type == other.type &&
               one.dims == other.dims && one.offset == other.offset && one.length == other.length;
    }
};

// All of a serialized ModelProto, those of branches among them. Throws Error (bundle) where it is not one.
std::vector<ExternalTensor> external_tensors(std::string_view model);

// Nodes that depend on initializers alone, as a graph of its own.
struct ConstantPart {
    std::string model;                 // a serialized ModelProto without inputs; empty where there is nothing
    std::vector<std::string> outputs;  // names that the rest of the graph reads
};

// The part of a graph's outermost nodes that ONNX Runtime folds as it opens the graph, without what matrices are made
// of: those are packed, and not kept. Throws as above.
ConstantPart constant_part(std::string_view model);

}  // namespace l2a::core
