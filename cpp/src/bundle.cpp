#include "bundle.hpp"

namespace l2a::core {
namespace {

constexpr std::uint64_t kMostBytes = 1U << 24;  // of the manifest

std::string read_manifest(const std::string& folder) {
    const std::string path = folder + "/" + kManifest;
    if (!is_folder(folder)) bundle_error(folder + ": no such folder; give the folder that export wrote");
    const auto size = file_size(folder, kManifest);
    if (!size) {
        bundle_error(folder + ": not a bundle: it holds no manifest.json; give the folder that export wrote");
    }
    if (*size > kMostBytes) {
        bundle_error(path + ": has " + std::to_string(*size) + " bytes, more than " + std::to_string(kMostBytes) +
                     kRemedy);
    }
    return std::string(map_file(folder, kManifest, *size)->text());
}

std::shared_ptr<Mapping> verified(const std::string& folder, const std::string& name, const FileEntry& entry) {
    const std::string path = folder + "/" + name;
    const auto size = file_size(folder, name);
    if (!size) bundle_error(path + ": the file is missing" + kRemedy);
    if (*size != entry.size) {
        bundle_error(path + ": has " + std::to_string(*size) + " bytes instead of " + std::to_string(entry.size) +
                     kRemedy);
    }
    auto file = map_file(folder, name, *size);
    const std::string digest = sha256_of(file->data(), file->size());
    if (digest != entry.sha256) {
        bundle_error(path + ": is corrupt: its SHA-256 is " + digest.substr(0, 12) + "... instead of " +
                     entry.sha256.substr(0, 12) + "..." + kRemedy);
    }
    return file;
}

}  // namespace

Bundle Bundle::open(const std::string& folder) {
    Bundle found;
    found.folder = folder;
    found.text = read_manifest(folder);
    try {
        found.manifest = Manifest::parse(found.text);
    } catch (const Error& error) {
        bundle_error(folder + "/" + kManifest + ": " + error.what() +
                     "; if manifest.json was changed, copy the folder or export it again");
    }
    for (const auto& [name, entry] : found.manifest.files) {
        auto file = verified(folder, name, entry);
        for (const GraphEntry& graph : found.manifest.graphs) {
            if (graph.file == name) found.graphs[name] = file;
        }
        if (name == kWeights) found.weights = file;
    }
    for (const std::string& name : names_ending(folder, ".onnx")) {
        if (found.manifest.files.count(name) == 0) {
            bundle_error(folder + "/" + name + ": a graph that manifest.json does not list; remove it or export again");
        }
    }
    found.weights->release_pages();  // hashing has read them all
    return found;
}

}  // namespace l2a::core
