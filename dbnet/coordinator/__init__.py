"""Who takes part, who is asked for what, when it ends.

A replica writes its status into the coordinator's window and reads its orders there (orders), every rank its sign of life
(heartbeat). membership follows who takes part and who is lost, crashes tells of
whom a defect took, guard what was refused, evaluation and progress what is asked for
and recorded: each is a duty. The coordinator hears messages and lets each of them act, once a round.
"""
