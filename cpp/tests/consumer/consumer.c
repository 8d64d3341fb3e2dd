/* The header is C. */
#include <l2a/l2a.h>
#include <stdio.h>

int main(int count, char** arguments) {
    l2a_status* status = l2a_verify(count > 1 ? arguments[1] : "");
    const int failed = l2a_status_code(status) != L2A_OK;
    if (failed) fprintf(stderr, "%s\n", l2a_status_message(status));
    l2a_status_free(status);
    return failed || l2a_abi_version() != L2A_ABI_VERSION;
}
