// The selector passes the golden cases that the Python one passes; signals are read on machines of several kinds.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <limits>

#include "cases.hpp"
#include "signals.hpp"

namespace {

using cases::Json;

double number(const Json& value) {
    if (value.is_null()) return std::numeric_limits<double>::quiet_NaN();
    return value == "inf" ? std::numeric_limits<double>::infinity() : value.get<double>();
}

Json cap(int64_t value) {
    return value == -1 ? Json(nullptr) : Json(value);
}
Json known(double value) {
    return std::isnan(value) ? Json(nullptr) : Json(value);
}

// A tree of files as another machine has it.
class Tree {
  public:
    Tree() {
        std::string name = std::filesystem::temp_directory_path() / "l2a-XXXXXX";
        if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
        root = name;
    }
    ~Tree() { std::filesystem::remove_all(root); }
    Tree(const Tree&) = delete;
    Tree& operator=(const Tree&) = delete;
    void put(const std::string& path, const std::string& text) const {
        const std::filesystem::path file = root + "/" + path;
        std::filesystem::create_directories(file.parent_path());
        std::ofstream(file) << text;
    }
    [[nodiscard]] std::map<std::string, l2a::Reading> read() const {
        std::map<std::string, l2a::Reading> found;
        for (l2a::Reading& reading : l2a::Signals("", root).read()) found[reading.name] = reading;
        return found;
    }
    std::string root;
};

}  // namespace

TEST_SUITE_BEGIN("machine");

TEST_CASE("the golden cases") {
    const Json golden = cases::read(std::string(L2A_GOLDEN) + "/selection_cases.json");
    REQUIRE(golden["cases"].size() >= 60);
    for (const Json& one : golden["cases"]) {
        CAPTURE(one["name"].get<std::string>());
        const std::string policy = golden["policies"][one["policy"].get<std::string>()].dump();
        const Json& steps = golden["steps"][one["steps"].get<std::string>()];
        const l2a::Selector selector(Json{{"steps", steps}}.dump(), policy);
        std::vector<l2a::Reading> readings;
        for (const auto& item : one["readings"].items()) readings.push_back({item.key(), "", number(item.value()), ""});
        const Json& work = one["work"];
        const l2a_work asked{work["prompt_tokens"].get<int64_t>(), work["new_tokens"].get<double>(),
                             work.value("think_tokens", 0.0), work.value("rows", int64_t{1})};
        const l2a_selector_state state{number(one["state"]["budget"]), number(one["state"]["since"])};
        std::string reasons;
        const l2a_decision found = selector.decide(readings, asked, state, one["now"].get<double>(),
                                                   one["tier"].get<std::string>(), nullptr, &reasons);
        CHECK(Json{{"budget", found.budget.compute},
                   {"layers", cap(found.budget.layers)},
                   {"heads", cap(found.budget.heads)},
                   {"think_tokens", cap(found.budget.think_tokens)},
                   {"admit", found.admit != 0},
                   {"binding", found.binding},
                   {"since", known(found.state.since)}} == one["expect"]);
        CHECK(steps[static_cast<std::size_t>(found.step)]["budget"] == found.budget.compute);
        for (const Json& term : Json::parse(reasons)) CHECK_FALSE(term["reason"].get<std::string>().empty());
    }
}

TEST_CASE("policies and cost tables that cannot be are refused") {
    const std::string step =
        R"({"budget": 1.0, "layers": 2, "heads": 4, "prefill_seconds": 1, "decode_seconds": 1, "memory_bytes": 1, "cache_bytes": 1})";
    const std::string costs = R"({"steps": [)" + step + "]}";
    for (const char* policy :
         {R"({"moon": 1})", R"({"kind": "max"})", R"({"time_margin": 2})", R"({"pressure_low": 0.9})", "[]", "{",
          R"({"buckets": 0})", R"({"tiers": {"x": {"floor": 0.9, "ceiling": 0.5}}})", R"({"dwell_seconds": "1"})"}) {
        CHECK_THROWS_AS(l2a::Selector(costs, policy), l2a::Error);
    }
    for (const std::string& table :
         {std::string("{}"), std::string(R"({"steps": []})"), R"({"steps": [)" + step + "," + step + "]}"}) {
        CHECK_THROWS_AS(l2a::Selector{table}, l2a::Error);
    }
    const l2a::Selector selector(costs);
    CHECK_THROWS_AS((void)selector.decide({}, {1, 1, 0, 1}, l2a::Selector::start(), 0.0, "gold"), l2a::Error);
}

TEST_CASE("more reasoning than integers count is cut to as much as they do") {
    Json step{{"budget", 1.0}, {"layers", 2}, {"heads", 4}, {"prefill_seconds", 1.0}, {"decode_seconds", 1.0},
              {"memory_bytes", 1.0}, {"cache_bytes", 1.0}};
    Json steps{step};
    step["budget"] = 0.5;
    steps.push_back(step);
    const l2a::Selector selector(Json{{"steps", steps}}.dump());
    const l2a_decision found =
        selector.decide({{"request.seconds_left", "seconds", 1.0, ""}}, {1, 1e300, 1e300, 1}, l2a::Selector::start(), 0.0);
    CHECK(found.budget.compute == 0.5);
    CHECK(found.budget.think_tokens > INT64_MAX / 4);
}

TEST_CASE("this machine") {
    for (const l2a::Reading& reading : l2a::Signals("0").read()) {
        CAPTURE(reading.name);
        CHECK(std::isnan(reading.value) == !reading.why.empty());
        if (reading.name == "host.memory_available") CHECK(reading.value > 1e6);
        if (reading.name == "host.cores") CHECK(reading.value >= 1);
    }
}

TEST_CASE("a control group of version 2 within one that is tighter") {
    const Tree tree;
    tree.put("proc/self/cgroup", "0::/a/b\n");
    tree.put("sys/fs/cgroup/cgroup.controllers", "cpu memory\n");
    tree.put("sys/fs/cgroup/a/memory.max", "3000\n");
    tree.put("sys/fs/cgroup/a/memory.high", "max\n");
    tree.put("sys/fs/cgroup/a/memory.current", "2500\n");
    tree.put("sys/fs/cgroup/a/memory.stat", "inactive_file 500\n");
    tree.put("sys/fs/cgroup/a/b/memory.max", "max\n");
    tree.put("sys/fs/cgroup/a/b/memory.high", "max\n");
    tree.put("sys/fs/cgroup/a/b/memory.current", "900\n");
    tree.put("sys/fs/cgroup/a/b/memory.stat", "anon 1\ninactive_file 100\n");
    tree.put("sys/fs/cgroup/a/b/memory.events", "low 0\nhigh 2\nmax 3\noom_kill 1\n");
    tree.put("sys/fs/cgroup/a/b/cpu.max", "150000 100000\n");
    tree.put("sys/fs/cgroup/a/b/cpu.stat", "usage_usec 5\nthrottled_usec 2000000\n");
    auto found = tree.read();
    CHECK(found["cgroup.memory_limit"].value == 3000);
    CHECK(std::isinf(found["cgroup.memory_high"].value));
    CHECK(found["cgroup.memory_used"].value == 800);
    CHECK(found["cgroup.memory_available"].value == 1000);
    CHECK(found["cgroup.memory_hits"].value == 5);
    CHECK(found["cgroup.oom_kills"].value == 1);
    CHECK(found["cgroup.cpu_limit"].value == 1.5);
    CHECK(found["cgroup.cpu_throttled"].value == 2);
    tree.put("sys/fs/cgroup/a/b/memory.high", "1500\n");
    found = tree.read();
    CHECK(found["cgroup.memory_high"].value == 1500);
    CHECK(found["cgroup.memory_available"].value == 700);  // of the inner group: 1500 - (900 - 100)
    tree.put("sys/fs/cgroup/a/b/memory.stat", "inactive_file 100\nactive_file 300\nfile_mapped 50\n");
    found = tree.read();
    CHECK(found["cgroup.memory_used"].value == 550);  // what was read twice and is not mapped can go
    CHECK(found["cgroup.memory_available"].value == 950);
    tree.put("sys/fs/cgroup/a/b/memory.stat", "inactive_file 100\nactive_file 300\nfile_mapped 900\n");
    CHECK(tree.read()["cgroup.memory_used"].value == 800);
}

TEST_CASE("memory that is left is the lower of host and control group, as far as one is known") {
    const Tree tree;
    const auto left = l2a::core::memory_source(tree.root);
    CHECK(std::isnan(left()));
    tree.put("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 2 kB\n");
    CHECK(left() == 2048);
    tree.put("proc/self/cgroup", "0::/\n");
    tree.put("sys/fs/cgroup/cgroup.controllers", "memory\n");
    tree.put("sys/fs/cgroup/memory.max", "3000\n");
    tree.put("sys/fs/cgroup/memory.current", "2600\n");
    tree.put("sys/fs/cgroup/memory.stat", "inactive_file 100\n");
    CHECK(left() == 500);
    tree.put("sys/fs/cgroup/memory.max", "max\n");
    CHECK(left() == 2048);
}

TEST_CASE("a control group of version 1, seen as the root of the mount") {
    const Tree tree;
    tree.put("proc/self/cgroup", "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n");
    tree.put("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n");
    tree.put("sys/fs/cgroup/memory/memory.soft_limit_in_bytes", "9223372036854771712\n");
    tree.put("sys/fs/cgroup/memory/memory.usage_in_bytes", "700\n");
    tree.put("sys/fs/cgroup/memory/memory.stat",
             "total_inactive_file 50\ntotal_active_file 170\ntotal_mapped_file 20\n");
    tree.put("sys/fs/cgroup/memory/memory.failcnt", "4\n");
    tree.put("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
    tree.put("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
    auto found = tree.read();
    CHECK(found["cgroup.memory_limit"].value == 1000);
    CHECK(std::isinf(found["cgroup.memory_high"].value));
    CHECK(found["cgroup.memory_available"].value == 500);
    CHECK(found["cgroup.memory_hits"].value == 4);
    CHECK(std::isinf(found["cgroup.cpu_limit"].value));
    CHECK(std::isnan(found["cgroup.oom_kills"].value));  // no such file: that reading alone is missing
    CHECK_FALSE(found["cgroup.oom_kills"].why.empty());
}

TEST_CASE("behind a pause, pressure is the kernel's average and not that of the pause") {
    const Tree tree;
    double now = 0;
    const auto source = l2a::core::pressure_source(tree.root, [&] { return now; });
    const auto read = [&](double at, const std::string& total) {
        now = at;
        tree.put("proc/pressure/cpu", "some avg10=90.00 avg60=1.00 avg300=0.00 total=" + total + "\n");
        std::vector<l2a::core::Reading> found;
        source->read(found);
        return found.front().value;
    };
    CHECK(read(100.0, "0") == doctest::Approx(0.9));
    CHECK(read(100.5, "100000") == doctest::Approx(0.2));
    CHECK(read(400.5, "9100000") == doctest::Approx(0.9));  // 9 s of waiting in 300 s would be 0.03
    CHECK(read(401.0, "9200000") == doctest::Approx(0.2));
}

TEST_CASE("pressure, and nothing at all") {
    const Tree tree;
    tree.put("proc/pressure/cpu", "some avg10=25.00 avg60=1.00 avg300=0.00 total=100\n");
    auto found = tree.read();
    CHECK(found["pressure.cpu_some"].value == 0.25);  // the first reading is the kernel's average
    CHECK(std::isnan(found["pressure.io_full"].value));
    CHECK(std::isnan(found["host.memory_available"].value));
    CHECK(std::isnan(found["cgroup.memory_limit"].value));
}

TEST_SUITE_END();
