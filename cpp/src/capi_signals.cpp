#include "capi.hpp"
#include "signals.hpp"

struct l2a_signals {
    std::vector<std::unique_ptr<l2a::core::Source>> sources;
    std::vector<l2a::core::Reading> readings;
    std::vector<l2a_reading> views;
};

l2a_status* l2a_signals_create(const char* root, const char* gpu, l2a_signals** out) {
    return l2a::core::guarded([&] {
        l2a::core::given(out, "out");
        const std::string from = root == nullptr ? "" : root;
        auto made = std::make_unique<l2a_signals>();
        made->sources.push_back(l2a::core::host_source(from));
        made->sources.push_back(l2a::core::pressure_source(from));
        made->sources.push_back(l2a::core::cgroup_source(from));
        if (gpu != nullptr) made->sources.push_back(l2a::core::gpu_source(gpu));
        *out = made.release();
    });
}

void l2a_signals_free(l2a_signals* signals) {
    delete signals;
}

l2a_status* l2a_signals_read(l2a_signals* signals, const l2a_reading** readings, size_t* size) {
    return l2a::core::guarded([&] {
        l2a_signals& used = l2a::core::given(signals, "signals");
        l2a::core::given(readings, "readings");
        l2a::core::given(size, "size");
        used.readings.clear();
        used.views.clear();
        for (const auto& source : used.sources) source->read(used.readings);
        for (const l2a::core::Reading& reading : used.readings) {
            used.views.push_back({reading.name, reading.unit, reading.value, reading.why.c_str()});
        }
        *readings = used.views.data();
        *size = used.views.size();
    });
}
