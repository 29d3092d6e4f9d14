/* What systems differ in: arguments and names of files in UTF-8, the console, the program's own file. */

#include "system.h"

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <stdlib.h>
#include <windows.h>
#include <shellapi.h>

enum { LONGEST_PATH = 32768 };

static char *utf8_of(const wchar_t *wide) {
    int size = WideCharToMultiByte(CP_UTF8, 0, wide, -1, NULL, 0, NULL, NULL);
    char *text = calloc((size_t)size + 1, 1);
    if (!text) exit(1);
    WideCharToMultiByte(CP_UTF8, 0, wide, -1, text, size, NULL, NULL);
    return text;
}

void prepare_system(int *count, char ***arguments) {
    SetConsoleOutputCP(CP_UTF8);
    _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
    int given;
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &given);
    char **texts = wide ? calloc((size_t)given + 1, sizeof *texts) : NULL;
    if (!texts) return;
    for (int i = 0; i < given; i++) texts[i] = utf8_of(wide[i]);
    *count = given, *arguments = texts;
}

FILE *open_file(const char *name) {
    static wchar_t wide[LONGEST_PATH];
    return MultiByteToWideChar(CP_UTF8, 0, name, -1, wide, LONGEST_PATH) ? _wfopen(wide, L"rb") : NULL;
}

FILE *open_itself(void) {
    static wchar_t wide[LONGEST_PATH];
    return GetModuleFileNameW(NULL, wide, LONGEST_PATH) ? _wfopen(wide, L"rb") : NULL;
}
#else
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#include <stdint.h>
#endif

void prepare_system(int *count, char ***arguments) { (void)count, (void)arguments; }

FILE *open_file(const char *name) { return fopen(name, "rb"); }

FILE *open_itself(void) {
#if defined(__APPLE__)
    static char path[4096];
    uint32_t size = sizeof path;
    return _NSGetExecutablePath(path, &size) ? NULL : fopen(path, "rb");
#else
    return fopen("/proc/self/exe", "rb");
#endif
}
#endif
