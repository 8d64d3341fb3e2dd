// The wire format of protocol buffers, as far as reading and joining ONNX graphs needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace l2a::core {

// Fields of one message, in order. Throws Error (bundle) where the bytes are none.
class Fields {
  public:
    explicit Fields(std::string_view bytes) : rest_(bytes) {}

    // Goes to the next field; false at the end.
    bool next();
    [[nodiscard]] std::uint64_t number() const noexcept { return number_; }
    [[nodiscard]] std::uint64_t value() const noexcept { return value_; }  // of a varint
    // Content of a field of bytes, text or a message; only where is_bytes.
    [[nodiscard]] std::string_view bytes() const noexcept { return bytes_; }
    [[nodiscard]] bool is_bytes() const noexcept { return is_bytes_; }
    [[nodiscard]] bool is_bytes(std::uint64_t number) const noexcept { return is_bytes_ && number_ == number; }
    // The field as it stands, key included.
    [[nodiscard]] std::string_view whole() const noexcept { return whole_; }

  private:
    std::string_view rest_;
    std::string_view whole_;
    std::string_view bytes_;
    std::uint64_t number_ = 0;
    std::uint64_t value_ = 0;
    bool is_bytes_ = false;
};

// Reads a varint at the front and takes it away.
std::uint64_t take_varint(std::string_view& bytes);

// A field of bytes as it is written.
std::string bytes_field(std::uint64_t number, std::string_view content);

}  // namespace l2a::core
