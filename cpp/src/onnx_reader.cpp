#include "onnx_reader.hpp"

#include <charconv>
#include <map>
#include <set>

#include "error.hpp"
#include "protobuf.hpp"

// Field numbers are those of onnx.proto (ONNX IR version 11).
namespace l2a::core {
namespace {

constexpr int kDeepestGraph = 64;  // of graphs within graphs
constexpr std::uint64_t kGraph = 7, kNode = 1, kInitializer = 5, kOutput = 12;

std::uint64_t number(std::string_view digits) {
    std::uint64_t value = 0;
    const char* end = digits.data() + digits.size();
    const auto [rest, code] = std::from_chars(digits.data(), end, value);
    if (code != std::errc() || rest != end) bundle_error("a tensor of an ONNX graph has no place in a file");
    return value;
}

void place(std::string_view entry, ExternalTensor& tensor) {
    std::string_view key;
    std::string_view value;
    for (Fields fields(entry); fields.next();) {
        if (fields.is_bytes(1)) key = fields.bytes();
        if (fields.is_bytes(2)) value = fields.bytes();
    }
    if (key == "location") tensor.location = value;
    if (key == "offset") tensor.offset = number(value);
    if (key == "length") tensor.length = number(value);
}

ExternalTensor tensor(std::string_view bytes) {
    ExternalTensor found;
    for (Fields fields(bytes); fields.next();) {
        if (fields.number() == 1 && !fields.is_bytes()) found.dims.push_back(static_cast<std::int64_t>(fields.value()));
        if (fields.is_bytes(1)) {  // packed
            for (std::string_view packed = fields.bytes(); !packed.empty();) {
                found.dims.push_back(static_cast<std::int64_t>(take_varint(packed)));
            }
        }
        if (fields.number() == 2) found.type = static_cast<int>(fields.value() & 0xFF);
        if (fields.is_bytes(8)) found.name = fields.bytes();
        if (fields.is_bytes(13)) place(fields.bytes(), found);
    }
    return found;
}

struct Node {
    std::vector<std::string> inputs, outputs;
    std::string_view kind;
    std::vector<std::string_view> branches;
};

Node node(std::string_view bytes) {
    Node found;
    for (Fields fields(bytes); fields.next();) {
        if (fields.is_bytes(1)) found.inputs.emplace_back(fields.bytes());
        if (fields.is_bytes(2)) found.outputs.emplace_back(fields.bytes());
        if (fields.is_bytes(4)) found.kind = fields.bytes();
        if (!fields.is_bytes(5)) continue;
        for (Fields attribute(fields.bytes()); attribute.next();) {
            if (attribute.is_bytes(6) || attribute.is_bytes(11)) found.branches.push_back(attribute.bytes());
        }
    }
    return found;
}

void collect(std::string_view graph, std::vector<ExternalTensor>& found, int depth) {
    if (depth > kDeepestGraph) bundle_error("not an ONNX graph of ours: graphs within graphs, too deep");
    for (Fields fields(graph); fields.next();) {
        if (fields.is_bytes(kInitializer)) {
            ExternalTensor each = tensor(fields.bytes());
            if (!each.location.empty()) found.push_back(std::move(each));
        }
        if (!fields.is_bytes(kNode)) continue;
        for (const std::string_view branch : node(fields.bytes()).branches) collect(branch, found, depth + 1);
    }
}

// Names that nodes of a graph and of its branches read, by whether a matrix product reads them.
void readers(std::string_view graph, std::map<std::string, bool>& found, const std::set<std::string>& constants,
             int depth) {
    if (depth > kDeepestGraph) bundle_error("not an ONNX graph of ours: graphs within graphs, too deep");
    for (Fields fields(graph); fields.next();) {
        if (!fields.is_bytes(kNode)) continue;
        const Node each = node(fields.bytes());
        const bool folded = depth == 0 && !each.outputs.empty() && constants.count(each.outputs.front()) > 0;
        for (const std::string& name : each.inputs) {
            if (!folded) found[name] = found[name] || each.kind.find("MatMul") != std::string_view::npos;
        }
        for (const std::string_view branch : each.branches) readers(branch, found, constants, depth + 1);
    }
}

bool is_foldable(const Node& node, const std::map<std::string, std::string_view>& initializers,
                 const std::set<std::string>& constants) {
    static const std::set<std::string_view> kinds{"Range", "Mul", "Cos", "Sin", "Unsqueeze", "Cast"};
    if (kinds.count(node.kind) == 0 || node.outputs.size() != 1 || !node.branches.empty()) return false;
    for (const std::string& name : node.inputs) {
        if (initializers.count(name) == 0 && constants.count(name) == 0) return false;
    }
    return !node.inputs.empty();
}

}  // namespace

std::vector<ExternalTensor> external_tensors(std::string_view model) {
    std::vector<ExternalTensor> found;
    for (Fields fields(model); fields.next();) {
        if (fields.is_bytes(kGraph)) collect(fields.bytes(), found, 0);
    }
    return found;
}

ConstantPart constant_part(std::string_view model) {
    std::string frame;  // versions and operator sets
    std::string_view graph;
    for (Fields fields(model); fields.next();) {
        if (fields.is_bytes(kGraph)) {
            graph = fields.bytes();
        } else {
            frame += fields.whole();
        }
    }
    std::map<std::string, std::string_view> initializers;
    for (Fields fields(graph); fields.next();) {
        if (fields.is_bytes(kInitializer)) initializers[tensor(fields.bytes()).name] = fields.whole();
    }
    std::set<std::string> constants;
    std::set<std::string> used;
    std::vector<std::pair<std::string, std::string>> factors;  // of products
    std::string inner = bytes_field(2, "constants");
    for (Fields fields(graph); fields.next();) {
        if (!fields.is_bytes(kNode)) continue;
        const Node each = node(fields.bytes());
        if (!is_foldable(each, initializers, constants)) continue;
        constants.insert(each.outputs.front());
        if (each.kind == "Mul") factors.emplace_back(each.outputs.front(), each.inputs.front());
        used.insert(each.inputs.begin(), each.inputs.end());
        inner += fields.whole();
    }
    for (const std::string& name : used) {
        const auto each = initializers.find(name);
        if (each != initializers.end()) inner += each->second;
    }
    std::map<std::string, bool> reads;
    readers(graph, reads, constants, 0);
    for (const auto& [name, from] : factors) {  // a product by one is dropped, and then its factor is what is read
        const auto reader = reads.find(name);
        if (reader != reads.end()) reads.insert({from, reader->second});
    }
    ConstantPart found;
    for (const std::string& name : constants) {
        const auto reader = reads.find(name);
        if (reader == reads.end() || reader->second) continue;
        inner += bytes_field(kOutput, bytes_field(1, name));
        found.outputs.push_back(name);
    }
    if (!found.outputs.empty()) found.model = frame + bytes_field(kGraph, inner);
    return found;
}

}  // namespace l2a::core
