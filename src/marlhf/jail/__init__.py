"""Inside the sandbox: the server, and the code that runs in its jails.

`marlhf.rewards.sandbox`, in the trainer's process, starts the server and compares the answers.

    server    the server and a handler per job, which reports the outputs of its programs
    messages  between the trainer's process and the server
    runner    starts jails, enforces their limits and judges how programs ended
    kernel    confinement of the server and of each jail: namespaces, mounts, capabilities, seccomp
    scratch   removal of scratch folders, by the server, its handlers and the trainer
    program   the first process of a jail: runs a program, or the test of one in another jail
    testing   in a test's jail: the test's end of the conversation, and replays of it
    peer      in both jails of a test: requests and replies
    lent      in both jails of a test: proxies of objects that stay in the other jail
    values    in jails and in the trainer's process: values as data, in JSON's types

These modules import the standard library alone. Jails are forked from the server: each import
would be in the memory of every untrusted program and count towards its limit, and a jail's root
has no installed package to import from.
"""
