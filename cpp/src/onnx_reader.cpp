#include "onnx_reader.hpp"

#include <charconv>

#include "error.hpp"

// Field numbers are those of onnx.proto (ONNX IR version 11).
namespace l2a::core {
namespace {

constexpr int kDeepest = 64;  // of graphs within graphs

struct Span {
    const std::uint8_t* at;
    const std::uint8_t* end;
};

struct Field {
    std::uint64_t number = 0;
    std::uint64_t value = 0;  // of a varint
    Span bytes{nullptr, nullptr};
    bool is_bytes = false;
};

std::uint64_t varint(Span& from) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        if (from.at == from.end) break;
        const std::uint8_t byte = *from.at++;
        value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
        if (byte < 0x80) return value;
    }
    bundle_error("not an ONNX graph: a number is cut off");
}

Span take(Span& from, std::uint64_t size) {
    if (size > static_cast<std::uint64_t>(from.end - from.at)) bundle_error("not an ONNX graph: a field is cut off");
    const Span found{from.at, from.at + size};
    from.at += size;
    return found;
}

Field next(Span& from) {
    const std::uint64_t key = varint(from);
    Field found;
    found.number = key >> 3;
    switch (key & 7) {
        case 0: found.value = varint(from); break;
        case 1: take(from, 8); break;
        case 2:
            found.bytes = take(from, varint(from));
            found.is_bytes = true;
            break;
        case 5: take(from, 4); break;
        default: bundle_error("not an ONNX graph: an unknown kind of field");
    }
    return found;
}

std::string text(Span bytes) { return {bytes.at, bytes.end}; }

std::uint64_t number(const std::string& digits) {
    std::uint64_t value = 0;
    const char* end = digits.data() + digits.size();
    const auto [rest, code] = std::from_chars(digits.data(), end, value);
    if (code != std::errc() || rest != end) bundle_error("a tensor of an ONNX graph has the place '" + digits + "'");
    return value;
}

void place(Span entry, ExternalTensor& tensor) {
    std::string key;
    std::string value;
    while (entry.at != entry.end) {
        const Field field = next(entry);
        if (field.is_bytes && field.number == 1) key = text(field.bytes);
        if (field.is_bytes && field.number == 2) value = text(field.bytes);
    }
    if (key == "location") tensor.location = value;
    if (key == "offset") tensor.offset = number(value);
    if (key == "length") tensor.length = number(value);
}

void tensor(Span from, std::vector<ExternalTensor>& found) {
    ExternalTensor tensor;
    while (from.at != from.end) {
        Field field = next(from);
        if (field.number == 1 && !field.is_bytes) tensor.dims.push_back(static_cast<std::int64_t>(field.value));
        if (field.number == 1 && field.is_bytes) {  // packed
            while (field.bytes.at != field.bytes.end) {
                tensor.dims.push_back(static_cast<std::int64_t>(varint(field.bytes)));
            }
        }
        if (field.number == 2) tensor.type = static_cast<int>(field.value & 0xFF);
        if (field.number == 8 && field.is_bytes) tensor.name = text(field.bytes);
        if (field.number == 13 && field.is_bytes) place(field.bytes, tensor);
    }
    if (!tensor.location.empty()) found.push_back(std::move(tensor));
}

void graph(Span from, std::vector<ExternalTensor>& found, int depth);

void node(Span from, std::vector<ExternalTensor>& found, int depth) {
    while (from.at != from.end) {
        const Field field = next(from);
        if (field.number != 5 || !field.is_bytes) continue;
        Span attribute = field.bytes;
        while (attribute.at != attribute.end) {
            const Field inner = next(attribute);
            if ((inner.number == 6 || inner.number == 11) && inner.is_bytes) graph(inner.bytes, found, depth + 1);
        }
    }
}

void graph(Span from, std::vector<ExternalTensor>& found, int depth) {
    if (depth > kDeepest) bundle_error("not an ONNX graph of ours: graphs within graphs, too deep");
    while (from.at != from.end) {
        const Field field = next(from);
        if (field.number == 1 && field.is_bytes) node(field.bytes, found, depth);
        if (field.number == 5 && field.is_bytes) tensor(field.bytes, found);
    }
}

}  // namespace

std::vector<ExternalTensor> external_tensors(const std::byte* data, std::size_t size) {
    const auto* begin = reinterpret_cast<const std::uint8_t*>(data);
    Span from{begin, begin + size};
    std::vector<ExternalTensor> found;
    while (from.at != from.end) {
        const Field field = next(from);
        if (field.number == 7 && field.is_bytes) graph(field.bytes, found, 0);
    }
    return found;
}

}  // namespace l2a::core
