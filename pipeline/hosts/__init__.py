"""What a job of several hosts needs beside a process group: `launcher` says who this process is among the ranks,
`meeting` who is where, `alike` whether all hosts hold the same, `storage` where each finds what the work_dir holds.
"""
