#include "files.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "error.hpp"

namespace l2a::core {
namespace {

std::vector<std::string> parts_of(std::string_view name) {
    std::vector<std::string> found;
    while (true) {
        const std::size_t end = name.find('/');
        found.emplace_back(name.substr(0, end));
        if (end == std::string_view::npos) return found;
        name.remove_prefix(end + 1);
    }
}

[[noreturn]] void unreadable(const std::string& path, int code) {
    bundle_error(path + ": cannot be read: " + std::strerror(code) + kRemedy);
}

}  // namespace

Mapping::Mapping(int descriptor, std::size_t size, const std::string& path) : size_(size) {
    void* found = size == 0 ? nullptr : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    const int code = errno;
    close(descriptor);
    if (found == MAP_FAILED) {
        throw Error(code == ENOMEM ? L2A_ERROR_OUT_OF_MEMORY : L2A_ERROR_BUNDLE,
                    path + ": cannot be mapped: " + std::strerror(code));
    }
    data_ = static_cast<std::byte*>(found);
}

Mapping::~Mapping() {
    if (data_ != nullptr) munmap(data_, size_);
}

void Mapping::release_pages() const noexcept {
    if (data_ != nullptr) madvise(data_, size_, MADV_DONTNEED);
}

std::optional<std::uint64_t> file_size(const std::string& folder, const std::string& name) {
    std::string path = folder;
    struct stat status {};
    for (const std::string& part : parts_of(name)) {
        path += "/" + part;
        if (lstat(path.c_str(), &status) != 0) {
            if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
            unreadable(path, errno);
        }
        if (S_ISLNK(status.st_mode)) {
            bundle_error(path + ": leaves the bundle folder, or may come to: it is a link; put what it names there");
        }
    }
    if (!S_ISREG(status.st_mode)) bundle_error(path + ": is a folder, a pipe or a device and not a file" + kRemedy);
    return static_cast<std::uint64_t>(status.st_size);
}

std::shared_ptr<Mapping> map_file(const std::string& folder, const std::string& name, std::uint64_t size) {
    const std::string path = folder + "/" + name;
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (descriptor < 0) unreadable(path, errno);
    struct stat status {};
    if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode) ||
        static_cast<std::uint64_t>(status.st_size) != size) {
        close(descriptor);
        bundle_error(path + ": was changed while it was opened" + kRemedy);
    }
    return std::make_shared<Mapping>(descriptor, static_cast<std::size_t>(size), path);
}

std::string sha256_of(const std::byte* data, std::size_t size) {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int length = 0;
    static const unsigned char nothing = 0;
    const void* from = size == 0 ? &nothing : static_cast<const void*>(data);
    if (EVP_Digest(from, size, digest.data(), &length, EVP_sha256(), nullptr) != 1) {
        throw Error(L2A_ERROR_INTERNAL, "libcrypto cannot compute a SHA-256");
    }
    std::string text;
    for (unsigned int at = 0; at < length; ++at) {
        text += "0123456789abcdef"[digest[at] >> 4];
        text += "0123456789abcdef"[digest[at] & 15];
    }
    return text;
}

bool is_inside(std::string_view name) {
    if (name.empty() || name.front() == '/' || name.find_first_of("\\:") != std::string_view::npos) return false;
    const std::vector<std::string> parts = parts_of(name);
    return std::none_of(parts.begin(), parts.end(),
                        [](const std::string& part) { return part.empty() || part == "." || part == ".."; });
}

std::vector<std::string> names_ending(const std::string& folder, std::string_view suffix) {
    std::vector<std::string> found;
    DIR* entries = opendir(folder.c_str());
    if (entries == nullptr) unreadable(folder, errno);
    while (const dirent* entry = readdir(entries)) {
        const std::string_view name = entry->d_name;
        if (name.size() >= suffix.size() && name.substr(name.size() - suffix.size()) == suffix) {
            found.emplace_back(name);
        }
    }
    closedir(entries);
    std::sort(found.begin(), found.end());
    return found;
}

bool is_folder(const std::string& path) {
    struct stat status {};
    return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

}  // namespace l2a::core
