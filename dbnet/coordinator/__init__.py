"""Who takes part, who is asked for what, when it ends.

A replica writes its status into the coordinator's window and reads its orders there (orders; recording notes them for a replay),
every rank its sign of life (heartbeat). membership follows who takes part and who is lost, and crashes tells it of whom a defect
took; guard counts what was refused, evaluation and progress see to what is asked for and recorded: each is a duty (duty says how
to add one), and so are the room checkpoint's Checkpoints. The coordinator hears messages, lets each duty act once a round, and
knows when to end.
"""
