// Files of a bundle: looked up without following links, read or mapped once, and hashed as they are read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace l2a::core {

// What an error about a file of a bundle ends with.
inline constexpr const char* kRemedy = "; copy the folder or export it again";

// Bytes of a file that never change: mapped, so that all who use them share one copy. Immutable, any thread.
class Mapping {
  public:
    // Takes over `descriptor` of a regular file of `size` bytes. Throws Error where the system cannot map it.
    Mapping(int descriptor, std::size_t size, const std::string& path);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    [[nodiscard]] const std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] std::string_view text() const noexcept { return {reinterpret_cast<const char*>(data_), size_}; }
    // Gives pages back that were read; they come again from the file when they are read again.
    void release_pages() const noexcept;

  private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

// The size of the regular file at a relative path, none where there is nothing. Opens nothing, follows no link.
std::optional<std::uint64_t> file_size(const std::string& folder, const std::string& name);

// Maps a file that file_size has found. The same errors, and one where it has another size than `size` by now.
std::shared_ptr<Mapping> map_file(const std::string& folder, const std::string& name, std::uint64_t size);

// SHA-256 as 64 hexadecimal digits.
std::string sha256_of(const std::byte* data, std::size_t size);

// Whether a listed path is relative, plain and inside of the folder on every system.
bool is_inside(std::string_view name);

// Names of the entries of a folder that end in `suffix`, sorted.
std::vector<std::string> names_ending(const std::string& folder, std::string_view suffix);

bool is_folder(const std::string& path);

}  // namespace l2a::core
