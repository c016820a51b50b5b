from dataclasses import replace

from inference.fakes import red_image, video_frame

from tood_deploy.inference.frame import Frame


def test_a_frame_knows_its_time_and_age() -> None:
    frame = video_frame(0, 1500)
    assert frame.timestamp_s == 1.5
    assert 0 <= frame.age_s() < 1
    assert replace(frame, decoded_s=frame.decoded_s - 10).age_s() >= 10
    assert Frame(red_image(), "a").timestamp_s is None
