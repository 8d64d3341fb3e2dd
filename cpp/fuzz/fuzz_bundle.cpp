// Whatever manifest.json holds, a bundle opens as a whole or is one bundle error. The folder's other files are those of
// the seed manifest (fuzz/run), so that a change of it may well be a bundle that opens.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "bundle.hpp"

namespace {

void put(const std::string& path, const void* data, std::size_t size) {
    const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || write(file, data, size) != static_cast<ssize_t>(size) || close(file) != 0) std::abort();
}

// In memory where there is such a folder.
std::string made() {
    std::string folder = access("/dev/shm", W_OK) == 0 ? "/dev/shm/l2a-fuzz-XXXXXX" : "/tmp/l2a-fuzz-XXXXXX";
    if (mkdtemp(folder.data()) == nullptr || mkdir((folder + "/s").c_str(), 0700) != 0) std::abort();
    for (const std::string name : {"weights.bin", "if.onnx", "b1.onnx", "b0.5.onnx", "s/b0.5.onnx"}) {
        put(folder + "/" + name, name.data(), name.size());
    }
    return folder;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const std::string folder = made();
    put(folder + "/manifest.json", data, size);
    try {
        l2a::core::Bundle::open(folder);
    } catch (const l2a::core::Error& error) {
        if (error.code() != L2A_ERROR_BUNDLE || std::string(error.what()).empty()) std::abort();
    }
    return 0;
}
