#include "protobuf.hpp"

#include "error.hpp"

namespace l2a::core {
namespace {

std::string_view take(std::string_view& bytes, std::uint64_t size) {
    if (size > bytes.size()) bundle_error("not an ONNX graph: a field is cut off");
    const std::string_view found = bytes.substr(0, static_cast<std::size_t>(size));
    bytes.remove_prefix(found.size());
    return found;
}

void put_varint(std::string& into, std::uint64_t value) {
    for (; value >= 0x80; value >>= 7) into += static_cast<char>((value & 0x7F) | 0x80);
    into += static_cast<char>(value);
}

}  // namespace

std::uint64_t take_varint(std::string_view& bytes) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64 && !bytes.empty(); shift += 7) {
        const auto byte = static_cast<unsigned char>(bytes.front());
        bytes.remove_prefix(1);
        value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
        if (byte < 0x80) return value;
    }
    bundle_error("not an ONNX graph: a number is cut off");
}

bool Fields::next() {
    if (rest_.empty()) return false;
    const std::string_view from = rest_;
    const std::uint64_t key = take_varint(rest_);
    number_ = key >> 3;
    is_bytes_ = (key & 7) == 2;
    switch (key & 7) {
        case 0:
            value_ = take_varint(rest_);
            break;
        case 1:
            take(rest_, 8);
            break;
        case 2: {
            const std::uint64_t size = take_varint(rest_);
            bytes_ = take(rest_, size);
            break;
        }
        case 5:
            take(rest_, 4);
            break;
        default:
            bundle_error("not an ONNX graph: an unknown kind of field");
    }
    whole_ = from.substr(0, from.size() - rest_.size());
    return true;
}

std::string bytes_field(std::uint64_t number, std::string_view content) {
    std::string found;
    put_varint(found, number << 3 | 2);
    put_varint(found, content.size());
    return found.append(content);
}

}  // namespace l2a::core
