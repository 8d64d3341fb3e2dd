// A bundle opens as a whole, or is one error that says where and what.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>

#include "cases.hpp"

namespace {

namespace fs = std::filesystem;

// A copy of a bundle that a test may break; files are hard links until they are written anew.
class Copy {
  public:
    Copy() {
        std::string name = fs::temp_directory_path() / "l2a-XXXXXX";
        if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
        root_ = name;
        folder = root_ / "bundle";
        fs::copy(cases::folder("fp32"), folder);
        manifest = cases::read(folder / "manifest.json");
    }
    ~Copy() { fs::remove_all(root_); }
    Copy(const Copy&) = delete;
    Copy& operator=(const Copy&) = delete;

    void put(const std::string& name, const std::string& text) const { std::ofstream(folder / name) << text; }
    void keep() const { put("manifest.json", manifest.dump()); }
    // What is wrong with it; "" for nothing.
    [[nodiscard]] std::string error() const {
        try {
            l2a::verify(folder);
        } catch (const l2a::Error& error) {
            CHECK(error.code() == L2A_ERROR_BUNDLE);
            return error.what();
        }
        return "";
    }
    fs::path folder;
    cases::Json manifest;

  private:
    fs::path root_;
};

bool has(const std::string& text, const std::string& part) {
    const bool found = text.find(part) != std::string::npos;
    if (!found) MESSAGE("'", text, "' lacks '", part, "'");
    return found;
}

}  // namespace

TEST_SUITE_BEGIN("bundle");

TEST_CASE("a whole bundle, and what its manifest says") {
    const Copy copy;
    CHECK(copy.error().empty());
    l2a::RuntimeOptions options;
    options.threads = 1;
    options.graphs = L2A_GRAPH_VARIANTS;
    const l2a::Runtime runtime(copy.folder, options);
    CHECK(cases::Json::parse(runtime.manifest()) == copy.manifest);
    CHECK(runtime.model().num_layers == copy.manifest["shape"]["num_layers"]);
    CHECK(runtime.graphs().size() == 6);
    CHECK(l2a_runtime_graph_name(runtime.get(), 99) == nullptr);
    CHECK(l2a_abi_version() == L2A_ABI_VERSION);
    CHECK_THROWS_AS(l2a::Engine{runtime}, l2a::Error);  // no If graph is open
}

TEST_CASE("files that are missing, changed, or somewhere else") {
    CHECK(has(
        [] {
            try {
                l2a::verify("/no/such/folder");
            } catch (const l2a::Error& error) {
                return std::string(error.what());
            }
            return std::string();
        }(),
        "no such folder"));
    const Copy missing;
    fs::remove(missing.folder / "if.onnx");
    CHECK(has(missing.error(), "if.onnx: the file is missing"));
    const Copy longer;
    std::ofstream(longer.folder / "if.onnx", std::ios::app) << "x";
    CHECK(has(longer.error(), "bytes instead of"));
    const Copy flipped;
    std::fstream(flipped.folder / "weights.bin", std::ios::in | std::ios::out | std::ios::binary) << "x";
    CHECK(has(flipped.error(), "weights.bin: is corrupt"));
    const Copy linked;
    fs::rename(linked.folder / "if.onnx", linked.folder / "other");
    fs::create_symlink("other", linked.folder / "if.onnx");
    CHECK(has(linked.error(), "it is a link"));
    const Copy pipe;
    fs::remove(pipe.folder / "if.onnx");
    REQUIRE(mkfifo((pipe.folder / "if.onnx").c_str(), 0600) == 0);
    CHECK(has(pipe.error(), "a pipe or a device"));
    const Copy left;
    left.put("old.onnx", "");
    CHECK(has(left.error(), "does not list"));
    const Copy none;
    fs::remove(none.folder / "manifest.json");
    CHECK(has(none.error(), "holds no manifest.json"));
    const Copy big;
    big.put("manifest.json", std::string(1 << 24, ' ') + "{}");
    CHECK(has(big.error(), "more than 16777216"));
}

TEST_CASE("manifests that are almost right") {
    using Json = cases::Json;
    const std::vector<std::pair<const char*, void (*)(Json&)>> changes{
        {"schema_version 2 is newer", [](Json& it) { it["schema_version"] = 2; }},
        {"unknown key", [](Json& it) { it["more"] = 1; }},
        {"is missing", [](Json& it) { it.erase("tags"); }},
        {"four different tokens", [](Json& it) { it["tags"]["think"] = it["tags"]["answer"]; }},
        {"tags.think must be at most", [](Json& it) { it["tags"]["think"] = 1000000; }},
        {"must be an integer", [](Json& it) { it["positions"] = 5.0; }},
        {"positions must be at most 2147483647", [](Json& it) { it["positions"] = 1LL << 31; }},
        {"multiple of num_groups", [](Json& it) { it["shape"]["num_heads"] = 7; }},
        {"64 bits", [](Json& it) { it["shape"]["hidden_size"] = 1LL << 62; }},
        {"end with all", [](Json& it) { it["widths"] = {1}; }},
        {"budgets must ascend",
         [](Json& it) {
             it["prices"] = {{0.5, 1.0}, {0.5, 2.0}};
         }},
        {"not a path inside", [](Json& it) { it["files"]["../x"] = it["files"]["if.onnx"]; }},
        {"not a path inside", [](Json& it) { it["files"]["manifest.json"] = it["files"]["if.onnx"]; }},
        {"64 hexadecimal digits", [](Json& it) { it["files"]["if.onnx"]["sha256"] = "A"; }},
        {"is not listed in files", [](Json& it) { it["graphs"][0]["file"] = "none.onnx"; }},
        {"each of its own name", [](Json& it) { it["graphs"][0]["name"] = it["graphs"][1]["name"]; }},
        {"must be nested", [](Json& it) { std::swap(it["graphs"][1], it["graphs"][3]); }},
        {"another model shape", [](Json& it) { it["graphs"][1]["allocation"]["groups"].push_back({0}); }},
        {"gates.stem_layers", [](Json& it) { it["gates"]["stem_layers"] = 100; }},
        {"gates.input_blind must be one of cap, mean", [](Json& it) { it["gates"]["input_blind"] = {"other"}; }},
    };
    for (const auto& [message, change] : changes) {
        Copy copy;
        change(copy.manifest);
        copy.keep();
        CHECK(has(copy.error(), message));
    }
    const Copy text;
    text.put("manifest.json", "{\"a\": 1, \"a\": 2}");
    CHECK(has(text.error(), "stands twice"));
}

TEST_CASE("graphs that have one name for two weights do not open together") {
    std::string found;
    try {
        (void)cases::open("apart");
    } catch (const l2a::Error& error) {
        CHECK(error.code() == L2A_ERROR_BUNDLE);
        found = error.what();
    }
    CHECK(has(found, "stands elsewhere"));
}

TEST_CASE("caches of two types cannot be served together") {
    const l2a::Runtime runtime = cases::open("mixed");
    CHECK_NOTHROW(cases::engine(runtime, false, 1));
    CHECK_THROWS_AS(cases::engine(runtime, true, 1), l2a::Error);
}

TEST_CASE("sizes whose product no integer holds do not turn admission by memory off") {
    Copy copy;
    copy.manifest["shape"]["hidden_size"] = 1;
    copy.manifest["shape"]["intermediate_size"] = 1LL << 57;
    copy.keep();
    const l2a::Runtime runtime(copy.folder);
    const cases::Case one = cases::of("fp32", false).front();
    l2a::Engine engine(runtime, {}, [] { return 1e15; });
    l2a::RequestOptions options = one.options;
    options.budget = l2a::full_budget();
    std::vector<int64_t> prompt = one.prompt;
    while (prompt.size() % 16 != 0) prompt.insert(prompt.begin(), prompt.front());  // 64 bits would have nothing left
    const l2a::Request request = engine.submit(prompt, options);
    while (engine.step()) continue;
    CHECK(request.info().error == L2A_ERROR_OUT_OF_MEMORY);
}

TEST_SUITE_END();
