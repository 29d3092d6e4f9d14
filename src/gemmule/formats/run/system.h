/* What systems differ in: arguments and names of files in UTF-8, the console, the program's own file. */

#ifndef SYSTEM_H
#define SYSTEM_H
#include <stdio.h>

/* Make the arguments UTF-8, and standard input and output binary; the console shows UTF-8. */
void prepare_system(int *count, char ***arguments);
/* Open a file for reading; NULL where it cannot be. */
FILE *open_file(const char *name);
FILE *open_itself(void);
#endif
