/* The one function of bcryptprimitives.dll that Rust's standard library calls, for Wine 8, which has no such library:
   random bytes. Windows itself is not given this. */
#include <windows.h>
#include <ntsecapi.h>

__declspec(dllexport) BOOL WINAPI ProcessPrng(PUCHAR bytes, SIZE_T length) {
    for (SIZE_T done = 0; done < length; done += 4096) {
        SIZE_T left = length - done;
        if (!RtlGenRandom(bytes + done, left < 4096 ? left : 4096))
            return FALSE;
    }
    return TRUE;
}
